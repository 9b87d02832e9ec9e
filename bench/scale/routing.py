"""Ways to choose a replica for a request."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, TypeAlias

from scale.replica import Replica
from scale.traffic import Request

Route: TypeAlias = Callable[[Request, Sequence[Replica], random.Random], int]
"""Takes a request and the living replicas, and returns the place of one of them."""

BOUND: Final = 1.25
"""With bounded affinity, no replica has more than this times the mean number of requests."""

SAMPLE: Final = 0.05
"""Share of replicas whose state the scorer does not know yet, as it reads metrics now and then."""


def anywhere(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
    """A random replica: a balancer that knows nothing of adapters."""
    return source.randrange(len(fleet))


def least_loaded(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
    """The less loaded of two random replicas."""
    one, other = source.randrange(len(fleet)), source.randrange(len(fleet))
    return one if fleet[one].load <= fleet[other].load else other


def affinity(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
    """The adapter's replica by rendezvous hashing, whatever its load."""
    return _order(request.adapter, len(fleet))[0]


def bounded_affinity(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
    """The first replica in the adapter's rendezvous order that is not loaded beyond the bound.

    Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016).
    """
    most = BOUND * (sum(each.load for each in fleet) + 1) / len(fleet)
    for place in _order(request.adapter, len(fleet)):
        if fleet[place].load < max(1.0, most):
            return place
    return _order(request.adapter, len(fleet))[0]


def scored(affinity: float, queue: float, running: float) -> Route:
    """The best sum of scores, as an endpoint picker of llm-d finds it; the arguments are weights.

    Affinity: 1.0 where the adapter is resident, 0.8 where another one fits, 0.6 where it is being
    loaded, otherwise 0. Queue and running: 1.0 for the replica with the fewest requests that wait,
    or that are there at all, and 0 for the one with most.
    """

    def route(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
        longest = max(each.queued for each in fleet) or 1
        least, most = min(each.load for each in fleet), max(each.load for each in fleet)
        best, found = -1.0, 0
        for place, each in enumerate(fleet):
            if source.random() < SAMPLE:
                continue
            if request.adapter in each.resident:
                near = 1.0
            elif each.room() > 0:
                near = 0.8
            else:
                near = 0.6 if each.is_loading(request.adapter) else 0.0
            free = (most - each.load) / (most - least) if most > least else 1.0
            score = affinity * near + queue * (1.0 - each.queued / longest) + running * free
            score += 1e-3 * source.random()
            if score > best:
                best, found = score, place
        return found

    return route


ROUTES: Final[dict[str, Route]] = {
    "random": anywhere,
    "least loaded of two": least_loaded,
    "affinity": affinity,
    "affinity, bounded load": bounded_affinity,
    "endpoint picker 4, 1, 0": scored(4, 1, 0),
    "endpoint picker 4, 2, 2": scored(4, 2, 2),
}


@cache
def _order(adapter: int, replicas: int) -> tuple[int, ...]:
    def weight(place: int) -> bytes:
        return hashlib.blake2b(f"{adapter} {place}".encode(), digest_size=8).digest()

    return tuple(sorted(range(replicas), key=weight))
