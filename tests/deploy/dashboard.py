"""The Grafana dashboards as the tests see them: panels, and queries with their variables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
DASHBOARD = FOLDER / "loraplex.json"
TENANTS = FOLDER / "loraplex-tenants.json"
GATEWAY = FOLDER / "loraplex-gateway.json"
ALL = (DASHBOARD, TENANTS, GATEWAY)


@dataclass(frozen=True, slots=True)
class Query:
    """One query of one panel."""

    panel: str
    expr: str

    def filled(self, variables: Mapping[str, str]) -> str:
        """The PromQL that Grafana would send."""
        expr = self.expr
        for name in sorted(variables, key=len, reverse=True):
            expr = expr.replace(f"${name}", variables[name])
        assert "$" not in expr, f"{self.panel}: a variable is left in {expr}"
        return expr


def load(file: Path = DASHBOARD) -> dict[str, Any]:
    """A dashboard's JSON."""
    return json.loads(file.read_text())


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel, those inside collapsed rows too."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def queries(board: dict[str, Any]) -> list[Query]:
    """Every query of every panel."""
    return [
        Query(panel["title"], target["expr"])
        for panel in panels(board)
        for target in panel.get("targets", [])
    ]
