"""Which bytes of a block of memory are taken: the bookkeeping of an arena. No torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator


class Ranges:
    """Ranges of `size` bytes in use, each at a multiple of `granule` bytes.

    A new range takes the smallest gap that is large enough, so large gaps stay for large ranges.
    """

    def __init__(self, size: int, granule: int) -> None:
        self.size = size // granule * granule
        self._granule = granule
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes in use, each range rounded up to whole granules."""
        return sum(self._lengths.values())

    def rounded(self, nbytes: int) -> int:
        """Bytes that a range of `nbytes` takes; an empty one takes a granule."""
        return max(1, -(-nbytes // self._granule)) * self._granule

    def place(self, nbytes: int) -> int | None:
        """Takes a range; returns its first byte, or None if no gap is large enough."""
        length = self.rounded(nbytes)
        fitting = [(gap, start) for start, gap in self._gaps() if gap >= length]
        if not fitting:
            return None
        start = min(fitting)[1]
        insort(self._starts, start)
        self._lengths[start] = length
        return start

    def free(self, start: int) -> None:
        """Frees the range that begins at `start`."""
        del self._lengths[start]
        del self._starts[bisect_left(self._starts, start)]

    def compacted(self) -> Iterator[tuple[int, int, int]]:
        """Moves all ranges to the front, in their order.

        Yields `(from, to, bytes)` of each range that moves, before the next range is considered, so
        the caller can move its bytes at once. `to` is below `from`; the two may overlap.
        """
        end = 0
        for start in list(self._starts):
            length = self._lengths[start]
            if start != end:
                self.free(start)
                insort(self._starts, end)
                self._lengths[end] = length
                yield start, end, length
            end += length

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """First byte and length of each gap between ranges, and of the rest."""
        end = 0
        for start in self._starts:
            if start > end:
                yield end, start - end
            end = start + self._lengths[start]
        if end < self.size:
            yield end, self.size - end
