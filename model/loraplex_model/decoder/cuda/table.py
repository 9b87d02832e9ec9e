"""The slot table in device memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.table import ENTRY, SlotTable

WORDS = ENTRY.itemsize // 8
"""64-bit words of an entry: eight addresses, then two pairs of 32-bit numbers."""

_STAGED = 8  # slots that can be on their way to the device at once


class DeviceTable:
    """The entries of a `SlotTable` in one device tensor, whose address never changes.

    Captured graphs read adapters through this tensor, so they need no new capture when adapters
    come and go.

    The host's table is the original. `update` runs between passes on the stream of the passes:
    passes queued before it read the old entries, passes queued after it the new ones. It copies the
    slots in `SlotTable.changed` alone, each through a row of pinned memory, which is written again
    only after its last copy has ended.

    Attributes:
        entries: int64 [slots, sites, `WORDS`], the bytes of `SlotTable.entries`.
    """

    def __init__(self, table: SlotTable, device: torch.device) -> None:
        self._table = table
        slots, sites = table.entries.shape
        self.entries = torch.zeros((slots, sites, WORDS), dtype=torch.int64, device=device)
        self._is_cuda = device.type == "cuda"
        shape = (min(_STAGED, slots), sites, WORDS)
        self._staged = torch.zeros(shape, dtype=torch.int64, pin_memory=self._is_cuda)
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._staged)
        self._next = 0
        table.changed.update(range(slots))
        self.update()

    def update(self) -> int:
        """Queues the copies of all changed slots; returns their number."""
        changed = sorted(self._table.changed)
        for slot in changed:
            self._copy(slot)
        self._table.changed.clear()
        return len(changed)

    def _copy(self, slot: int) -> None:
        at, self._next = self._next, (self._next + 1) % len(self._staged)
        copied = self._copied[at]
        if copied is not None:
            copied.synchronize()
        staged = self._staged[at]
        staged.copy_(torch.from_numpy(_words(self._table.entries[slot])))
        self.entries[slot].copy_(staged, non_blocking=self._is_cuda)
        if self._is_cuda:
            copied = copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._copied[at] = copied


def _words(entries: NDArray[np.void]) -> NDArray[np.int64]:
    """The entries of one slot as int64 [sites, `WORDS`], a view."""
    return entries.view(np.int64).reshape(len(entries), WORDS)
