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


def scored(request: Request, fleet: Sequence[Replica], source: random.Random) -> int:
    """The best score of an endpoint picker: LoRA affinity with weight 4, short queues with 1.

    Affinity as of llm-d: 1.0 where the adapter is resident, 0.8 where another one fits, 0.6 where
    it is being loaded, otherwise 0.
    """
    longest = max(each.queued for each in fleet) or 1
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
        score = 4.0 * near + 1.0 - each.queued / longest + 1e-3 * source.random()
        if score > best:
            best, found = score, place
    return found


ROUTES: Final[dict[str, Route]] = {
    "random": anywhere,
    "least loaded of two": least_loaded,
    "affinity": affinity,
    "affinity, bounded load": bounded_affinity,
    "endpoint picker": scored,
}


@cache
def _order(adapter: int, replicas: int) -> tuple[int, ...]:
    def weight(place: int) -> bytes:
        return hashlib.blake2b(f"{adapter} {place}".encode(), digest_size=8).digest()

    return tuple(sorted(range(replicas), key=weight))
