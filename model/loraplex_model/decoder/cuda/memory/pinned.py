"""Pinned host memory: one block, of which adapters and staging buffers take parts.

A device copies from pinned memory while it computes; a copy from other memory blocks the caller.
Pinning takes the driver's lock, and is expected to take tens of milliseconds (not measured), so it
is done once, at the start. torch's
own pinned memory is not used for adapters because each block is rounded up to a power of two.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from loraplex_model.decoder.cuda.memory.ranges import Ranges
from loraplex_model.ops import mapping

log = logging.getLogger(__name__)

_GRANULE = 4096
_BEING_READ = 512 << 20
_SMALLEST = 1 << 17  # from this size on the memory is a mapping of its own, whole pages

Pin = Callable[[int, int], str | None]
"""Pins `(address, bytes)`; returns why that failed, or None."""


class PinnedArena:
    """A block of `nbytes` bytes of pinned host memory. All methods may run on any thread."""

    def __init__(self, nbytes: int, pin: Pin | None = None) -> None:
        """If the memory cannot be pinned, a warning is logged and the arena has no bytes."""
        self._memory = mapping.zeros(max(nbytes, _SMALLEST))
        failure = (pin or pin_memory)(self._memory.data_ptr(), self._memory.nbytes)
        if failure is not None:
            log.warning(
                "host memory is not pinned, so adapters are copied more slowly: %s", failure
            )
            nbytes, self._memory = 0, mapping.zeros(0)
        self._ranges = Ranges(nbytes, _GRANULE)
        self._lock = threading.Lock()
        # A range is freed by the garbage collector, which may run on any thread and at any moment,
        # so the range is only noted then. Appending to a deque needs no lock.
        self._freed: deque[int] = deque()

    @staticmethod
    def size_for(budget: int, largest: int) -> int:
        """Bytes for `budget` bytes of adapters, and for those that are being read beside them.

        No adapter has more than `largest` bytes. Without room beside the budget, every adapter that
        is read while the budget is used up would be in ordinary memory, and copying it would stop
        the passes.
        """
        return budget + min(largest, _BEING_READ)

    @property
    def size(self) -> int:
        """Bytes that can be taken in all."""
        return self._ranges.size

    @property
    def used(self) -> int:
        """Bytes that are taken, each tensor's rounded up to whole pages."""
        with self._lock:
            self._collect()
            return self._ranges.used

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Zeros, uint8 [nbytes]: pinned if the arena has room, else in ordinary memory.

        The range is freed with the last tensor that shares the memory. A copy to a device
        must have ended by then.
        """
        with self._lock:
            self._collect()
            start = self._ranges.place(nbytes) if nbytes else None
        if start is None:
            return mapping.zeros(nbytes)
        owner = (ctypes.c_uint8 * nbytes).from_address(self._memory.data_ptr() + start)
        weakref.finalize(owner, self._freed.append, start).atexit = False
        tensor = torch.frombuffer(owner, dtype=torch.uint8)
        return tensor.zero_()

    def _collect(self) -> None:
        while self._freed:
            self._ranges.free(self._freed.popleft())


def pin_memory(address: int, nbytes: int) -> str | None:
    """Pins host memory for CUDA; returns why that failed, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    if status == 0:
        return None
    take_error()
    return f"cudaHostRegister returned {status}"


def take_error() -> None:
    """Takes the error that CUDA keeps after a call that failed and that torch did not check.

    torch asks for it after every launch, and would report it for the next one, whatever that is.
    """
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
