"""Eviction order: GreedyDual-Size, with the seconds of reloading as the cost.

An adapter's worth is `floor + seconds / bytes`: the reload time that each of its bytes saves, above
a floor that rises to the worth of the last adapter evicted. Each use renews the worth at the
current floor, so an unused adapter is overtaken sooner or later, however costly it was. With equal
cost per byte this is least recently used. After P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching
Algorithms", USENIX Symposium on Internet Technologies and Systems, 1997.
"""

from __future__ import annotations


class GreedyDual:
    """The order in which keys should leave. Budgets belong to the caller."""

    def __init__(self) -> None:
        self._floor = 0.0
        self._uses = 0
        self._worth: dict[str, tuple[float, int]] = {}

    def touch(self, key: str, nbytes: int, seconds: float) -> None:
        """Notes that a key was added or used; `seconds` is the cost of bringing it back."""
        self._uses += 1
        self._worth[key] = (self._floor + seconds / max(nbytes, 1), self._uses)

    def worth(self, key: str) -> tuple[float, int]:
        """Sort key, smallest for the key that should leave first; ties leave by last use."""
        return self._worth[key]

    def evict(self, key: str) -> None:
        """Forgets a key that had to make room, and raises the floor to its worth."""
        self._floor = max(self._floor, self._worth.pop(key)[0])

    def forget(self, key: str) -> None:
        """Forgets a key that left for another reason."""
        self._worth.pop(key, None)
