"""The memory that holds adapters: packed in host memory, and in their slots on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged
from loraplex_model.ops import mapping

Moved = Callable[[PackedAdapter], None]
"""Called with an adapter at its new place when it is moved on the device."""


class AdapterMemory(Protocol):
    """Memory for adapters. `zeros` and `aside` may be used on any thread."""

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Zeros in host memory, uint8 [nbytes], from which the device can copy."""

    def prepare(self, adapter: PackedAdapter) -> bool:
        """Begins or continues to copy an adapter to the device; True once it is there."""

    def take(self, adapter: PackedAdapter, on_move: Moved) -> PackedAdapter:
        """The adapter on the device; passes launched from now on may read it."""

    def free(self, placed: PackedAdapter) -> None:
        """Gives back the device memory of an adapter that no later pass reads."""

    def aside(self) -> AbstractContextManager[None]:
        """A context for a loader thread's work on the device, on a stream other than the passes'.

        The results of the work are complete when the context ends.
        """

    def hand_over(self, merged: Merged) -> None:
        """Prepares dense copies that were computed in `aside` for use by passes."""


class SharedMemory:
    """The device is the host, so an adapter is used where it was packed."""

    def zeros(self, nbytes: int) -> torch.Tensor:
        """See `AdapterMemory`."""
        return mapping.zeros(nbytes)

    def prepare(self, adapter: PackedAdapter) -> bool:
        """See `AdapterMemory`."""
        return True

    def take(self, adapter: PackedAdapter, on_move: Moved) -> PackedAdapter:
        """See `AdapterMemory`."""
        return adapter

    def free(self, placed: PackedAdapter) -> None:
        """See `AdapterMemory`."""

    def aside(self) -> AbstractContextManager[None]:
        """See `AdapterMemory`."""
        return nullcontext()

    def hand_over(self, merged: Merged) -> None:
        """See `AdapterMemory`."""


def adapter_memory(
    device: torch.device, adapter_budget: int, host_budget: int, slots: int
) -> AdapterMemory:
    """The memory for adapters on `device`; on CUDA allocated here. Budgets are bytes."""
    if device.type != "cuda":
        return SharedMemory()
    from loraplex_model.decoder.cuda.memory.adapters import CudaAdapterMemory

    return CudaAdapterMemory(device, adapter_budget, host_budget, slots)
