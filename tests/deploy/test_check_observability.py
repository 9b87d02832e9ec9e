"""The check of dashboards and rules finds what has no data, no test, or cannot be evaluated."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
from deploy.dashboard import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_observability", ROOT / "scripts" / "check_observability.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class FakePrometheus:
    """Has data for what contains one of the texts."""

    there: tuple[str, ...]
    asked: list[str] = field(default_factory=list)

    def values(self, expr: str, start: float, end: float) -> list[float]:
        self.asked.append(expr)
        return [0.0] if any(text in expr for text in self.there) else []


def rule(query: str, health: str = "ok") -> dict[str, Any]:
    return {"name": "A", "health": health, "query": query}


def test_a_rule_is_asked_for_its_series_with_the_labels_that_it_matches(script: ModuleType) -> None:
    query = (
        'sum by (instance) (rate(loraplex_a_total{reason=~"X|Y",code!="OK"}[5m])) / '
        'loraplex_b > 0 and up{job="loraplex"} == 0'
    )
    all_of_it = FakePrometheus(("loraplex_a_total", "loraplex_b", "up"))
    assert not list(script.faults(rule(query), all_of_it, 0, 1))
    assert all_of_it.asked == [
        'loraplex_a_total{reason!="",code!=""}', "loraplex_b", 'up{job!=""}'
    ]  # fmt: skip
    some = FakePrometheus(("loraplex_b", "up"))
    assert len(list(script.faults(rule(query), some, 0, 1))) == 1


def test_a_rule_that_cannot_be_evaluated_is_a_fault(script: ModuleType) -> None:
    assert list(script.faults(rule("up", health="err"), FakePrometheus(("up",)), 0, 1))


def test_a_rule_without_a_test_in_which_it_fires_is_found(script: ModuleType) -> None:
    cases, untested = script.tests_of({"LoraplexDown", "LoraplexNew"})
    assert cases > 50
    assert untested == {"LoraplexNew"}
