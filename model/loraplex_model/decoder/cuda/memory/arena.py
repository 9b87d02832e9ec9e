"""Memory of the device for adapters: one block, allocated once, divided into ranges.

Allocating and freeing device memory waits for the device, so it may not happen while requests are
served. An adapter's memory is a range of the arena instead. Adapters of different sizes leave gaps;
if no gap is large enough although the sum of all gaps is, the adapters are moved together. An
estimate, not measured: this takes the device about a millisecond for each gigabyte.

    device bytes   | adapter 3 |    gap    | adapter 7 | gap | adapter 1 |      rest        |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.decoder.cuda.memory.ranges import Ranges

GRANULE = 4096
"""Bytes of which every range is a multiple."""

_SCRATCH = 16 << 20
"""Most bytes that are moved at a time, by way of other memory: source and target may overlap."""


class ArenaFull(Exception):
    """An adapter does not fit into the arena, even if the adapters in it are moved together."""


class DeviceArena:
    """Adapters on the device, in one tensor of `nbytes` bytes.

    All moves are made on the current stream. So passes that were launched before a move read the
    old places, and later ones the new.

    Attributes:
        moves: adapters moved since the start.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._data = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(min(nbytes, _SCRATCH), dtype=torch.uint8, device=device)
        self._ranges = Ranges(nbytes, GRANULE)
        self._places: dict[int, tuple[PackedAdapter, Callable[[PackedAdapter], None]]] = {}
        self.moves = 0

    @property
    def used(self) -> int:
        """Bytes in use, each adapter rounded up to whole granules."""
        return self._ranges.used

    @staticmethod
    def size_for(budget: int, adapters: int) -> int:
        """Bytes of an arena in which `adapters` adapters of `budget` bytes in all always fit."""
        return -(-budget // GRANULE) * GRANULE + adapters * GRANULE

    def place(
        self, adapter: PackedAdapter, on_move: Callable[[PackedAdapter], None]
    ) -> PackedAdapter:
        """The same adapter with a range of the arena as its data, which is not yet written.

        `on_move` is called with the adapter at its new place whenever it is moved. Raises
        `ArenaFull`.
        """
        start = self._ranges.place(adapter.nbytes)
        if start is None and self._ranges.used + self._ranges.rounded(adapter.nbytes) <= (
            self._ranges.size
        ):
            self._compact()
            start = self._ranges.place(adapter.nbytes)
        if start is None:
            raise ArenaFull(f"no room for {adapter.nbytes} bytes: {self.used} are in use")
        placed = self._at(adapter, start)
        self._places[start] = placed, on_move
        return placed

    def watch(self, placed: PackedAdapter, on_move: Callable[[PackedAdapter], None]) -> None:
        """Calls `on_move`, instead of the function given before, when the adapter is moved."""
        self._places[int(placed.data.storage_offset())] = placed, on_move

    def free(self, placed: PackedAdapter) -> None:
        """Frees the range of an adapter that `place` returned or `on_move` received."""
        start = int(placed.data.storage_offset())
        del self._places[start]
        self._ranges.free(start)

    def _at(self, adapter: PackedAdapter, start: int) -> PackedAdapter:
        data = self._data[start : start + adapter.nbytes]
        return PackedAdapter(data, adapter.places, adapter.virtual_places, adapter.options)

    def _compact(self) -> None:
        for old, new, length in self._ranges.compacted():
            self._move(old, new, length)
            placed, on_move = self._places.pop(old)
            moved = self._at(placed, new)
            self._places[new] = moved, on_move
            self.moves += 1
            on_move(moved)

    def _move(self, old: int, new: int, length: int) -> None:
        step = len(self._scratch)
        for at in range(0, length, step):
            part = self._scratch[: min(step, length - at)]
            part.copy_(self._data[old + at : old + at + len(part)])
            self._data[new + at : new + at + len(part)] = part
