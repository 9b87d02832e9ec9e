"""States of the front process that are read when the metrics are, and cost nothing otherwise."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_server.registry.names import Names
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.runtime.lanes import Lane, Lanes

if TYPE_CHECKING:
    from loraplex_server.metrics import Metrics

LANE_STATES: Final = ("running", "waiting")


def watch_front(metrics: Metrics, lanes: Lanes, gate: CallGate) -> None:
    """Shows from now on what runs and waits in the lanes, and how many calls are open."""
    metrics.series.open_calls.set_function(lambda: float(gate.calls))
    for name, lane in lanes.named().items():
        for state in LANE_STATES:
            gauge = metrics.series.lane_calls.labels(name, state)
            gauge.set_function(partial(_calls, lane, state))


def watch_names(metrics: Metrics, names: Names) -> None:
    """Shows from now on how fresh the known names are, and names adapters by them."""
    freshness = names.freshness
    metrics.series.index_away_seconds.set_function(freshness.away_seconds)
    metrics.series.index_age_seconds.set_function(freshness.age_seconds)
    metrics.residency.name(names.known)


def _calls(lane: Lane, state: str) -> float:
    return float(lane.running if state == "running" else lane.waiting)
