"""Deadlines of unfinished requests or orders, in the order in which they pass."""

from __future__ import annotations

import heapq

_FEW = 64
"""Number of entries below which the heap is not worth rebuilding."""


class Deadlines:
    """One deadline per key, which is the number of a request or of an order.

    Memory is proportional to the number of deadlines that are kept now.

    A removed deadline stays in the heap until it reaches the top or until half of the heap
    consists of such entries, when the heap is rebuilt; so each operation takes logarithmic time on
    average.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._kept: dict[int, float] = {}

    def __len__(self) -> int:
        """Number of entries in memory, removed ones included."""
        return len(self._heap)

    def add(self, key: int, deadline: float) -> None:
        """Adds the deadline of a key that has none."""
        assert key not in self._kept, "a key has two deadlines"
        self._kept[key] = deadline
        heapq.heappush(self._heap, (deadline, key))

    def remove(self, key: int) -> None:
        """Removes a key's deadline. No effect if it has none."""
        if self._kept.pop(key, None) is not None:
            self._shrink()

    def of(self, key: int) -> float | None:
        """A key's deadline; None if it has none, or if it has passed."""
        return self._kept.get(key)

    @property
    def next(self) -> float | None:
        """The earliest deadline; None if there is none."""
        self._drop_removed()
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> list[int]:
        """Removes the deadlines that have passed; returns their keys, the earliest first."""
        passed: list[int] = []
        while (deadline := self.next) is not None and deadline <= now:
            _, key = heapq.heappop(self._heap)
            del self._kept[key]
            passed.append(key)
        self._shrink()
        return passed

    def _shrink(self) -> None:
        if len(self._heap) > max(2 * len(self._kept), _FEW):
            self._heap = [(deadline, kept) for kept, deadline in self._kept.items()]
            heapq.heapify(self._heap)

    def _drop_removed(self) -> None:
        while self._heap and self._kept.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
