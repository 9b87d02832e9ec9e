"""Who leaves when memory is short: GreedyDual-Size, with seconds of reloading as the cost.

An adapter's worth is `floor + seconds / bytes`: what a byte of it saves when it is asked for again,
above a floor that rises to the worth of whatever was evicted last. Being used renews the worth, at
the floor of that time, so what is not used is overtaken sooner or later however costly it was. With
equal cost per byte this is least recently used. After P. Cao and S. Irani, "Cost-Aware WWW Proxy
Caching Algorithms", USENIX Symposium on Internet Technologies and Systems, 1997.
"""

from __future__ import annotations


class GreedyDual:
    """The order in which keys should leave. It knows no budget; its owner decides when."""

    def __init__(self) -> None:
        self._floor = 0.0
        self._uses = 0
        self._worth: dict[str, tuple[float, int]] = {}

    def touch(self, key: str, nbytes: int, seconds: float) -> None:
        """Notes that a key came in or was used; `seconds` is what bringing it back would cost."""
        self._uses += 1
        self._worth[key] = (self._floor + seconds / max(nbytes, 1), self._uses)

    def worth(self, key: str) -> tuple[float, int]:
        """Sorts before the worth of whatever should stay longer; equal ones by their last use."""
        return self._worth[key]

    def evict(self, key: str) -> None:
        """Forgets a key that had to make room, and lets the floor rise to its worth."""
        self._floor = max(self._floor, self._worth.pop(key)[0])

    def forget(self, key: str) -> None:
        """Forgets a key that left for another reason."""
        self._worth.pop(key, None)
