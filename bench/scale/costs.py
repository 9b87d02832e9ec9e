"""What a server's work costs, as measured; kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (1, 16, 64)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one replica, in milliseconds.

    Attributes:
        step: of a step that only decodes, without rows.
        row: of a row in it.
        distinct: of each different adapter in it.
        prompt_token: of a token of a prompt with an adapter.
        from_host: to bring an adapter from host memory to the device.
        from_disk: to read an adapter from the disk and bring it to the device.
        on_device, on_host: adapters that fit into each tier.
    """

    step: float
    row: float
    distinct: float
    prompt_token: float
    from_host: float
    from_disk: float
    on_device: int
    on_host: int

    def decode(self, rows: int, distinct: int) -> float:
        """Milliseconds of a step with so many rows and different adapters."""
        return self.step + self.row * rows + self.distinct * distinct

    def rate(self, rows: int) -> float:
        """Tokens a second of a replica that decodes `rows` rows of as many adapters."""
        return 1e3 * rows / self.decode(rows, rows)


def fitted(passes: Mapping[str, Mapping[str, float]], host_ms: float) -> dict[str, float]:
    """Costs of steps: least squares of the passes that `bench/step.py` prints as `passes_ms`.

    The errors are relative, so that short passes count as much as long ones. `host_ms` is the
    host's work in a step.
    """
    cases = [(f"decode_{rows}", rows, 0) for rows in ROWS]
    cases += [(f"decode_{rows}_adapters", rows, rows) for rows in ROWS]
    measured = np.array([sum(passes[name].values()) for name, _, _ in cases])
    factors = np.array([[1.0, rows, distinct] for _, rows, distinct in cases])
    solved = np.linalg.lstsq(factors / measured[:, None], np.ones(len(cases)), rcond=None)[0]
    prompt = sum(passes["prefill_128_adapters"].values()) / 128
    step, row, distinct = (float(max(0.0, each)) for each in solved)
    return {"step": step + host_ms, "row": row, "distinct": distinct, "prompt_token": prompt}


def read(file: Path) -> Costs:
    """The costs in a JSON file."""
    told: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return Costs(**told["costs"])
