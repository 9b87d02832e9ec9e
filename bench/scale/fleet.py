"""Runs requests through a fleet, and sums up what they met."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scale.costs import Costs
from scale.replica import Replica
from scale.routing import Route
from scale.traffic import Request, Traffic, requests

DRAIN = 60e3
"""Milliseconds that requests may take after the last arrival."""

WARM = 0.25
"""Part of the time at the beginning whose requests are not counted: the fleet starts cold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the requests of a run met. Times are in milliseconds.

    Attributes:
        cold: share of requests whose adapter was read from disk.
        host: share whose adapter came from host memory.
        first: times to the first token: median, 95th and 99th percentile.
        gap: mean time between two tokens of a request, its 99th percentile.
        unfinished: share of requests that were not answered when the run ended.
        unevenness: requests of the busiest replica over those of a mean one.
        copies: mean number of replicas on which an adapter with a request is resident at the end.
    """

    cold: float
    host: float
    first: tuple[float, float, float]
    gap: float
    unfinished: float
    unevenness: float
    copies: float


def run(costs: Costs, replicas: int, traffic: Traffic, route: Route, lose: int = 0) -> Outcome:
    """Runs one traffic. `lose` replicas are replaced by empty ones in the middle of the time."""
    source = random.Random(traffic.seed)
    fleet = [Replica(costs) for _ in range(replicas)]
    events = _Events(fleet)
    served: Counter[int] = Counter()
    counted: list[Request] = []
    end, warm = 1e3 * traffic.seconds, 1e3 * traffic.seconds * WARM
    for request in requests(traffic):
        if lose and request.at > (end + warm) / 2:
            for place in range(lose):
                fleet[place] = _empty(costs, request.at)
                events.changed(place)
            lose = 0
        events.until(request.at)
        place = route(request, fleet, source)
        fleet[place].advance(request.at)
        fleet[place].arrive(request)
        events.changed(place)
        served[place] += 1
        if request.at >= warm:
            counted.append(request)
    events.until(end + DRAIN)
    return _summed(counted, fleet, served)


class _Events:
    """The next event of each replica. What a replica counts changes at its events only."""

    def __init__(self, fleet: list[Replica]) -> None:
        self._fleet = fleet
        self._stamps = [0] * len(fleet)
        self._heap: list[tuple[float, int, int]] = []

    def changed(self, place: int) -> None:
        """To be called when something happened to a replica."""
        self._stamps[place] += 1
        at = self._fleet[place].next_event()
        if at != float("inf"):
            heapq.heappush(self._heap, (at, place, self._stamps[place]))

    def until(self, now: float) -> None:
        """Lets everything happen that happens before `now`."""
        while self._heap and self._heap[0][0] <= now:
            at, place, stamp = heapq.heappop(self._heap)
            if stamp == self._stamps[place]:
                self._fleet[place].advance(at)
                self.changed(place)


def _empty(costs: Costs, now: float) -> Replica:
    fresh = Replica(costs)
    fresh.advance(now)
    return fresh


def _summed(counted: Sequence[Request], fleet: Sequence[Replica], served: Counter[int]) -> Outcome:
    tiers = Counter(request.tier for request in counted)
    done = [request for request in counted if request.end]
    first = np.array([r.first - r.at for r in counted if r.first] or [np.inf])
    gaps = np.array([(r.end - r.first) / max(1, r.output) for r in done] or [np.inf])
    held = Counter(adapter for each in fleet for adapter in each.resident)
    p50, p95, p99 = (float(np.percentile(first, q)) for q in (50, 95, 99))
    return Outcome(
        cold=tiers["disk"] / len(counted),
        host=tiers["host"] / len(counted),
        first=(p50, p95, p99),
        gap=float(np.percentile(gaps, 99)),
        unfinished=1.0 - len(done) / len(counted),
        unevenness=max(served.values()) * len(fleet) / served.total(),
        copies=held.total() / max(1, len(held)),
    )
