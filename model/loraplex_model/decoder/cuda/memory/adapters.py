"""Memory for the adapters of one CUDA device: pinned on the host, an arena on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.adapters.table import Merged
from loraplex_model.decoder.cuda.memory.arena import DeviceArena
from loraplex_model.decoder.cuda.memory.copies import CudaCopies, DeviceAdapters
from loraplex_model.decoder.cuda.memory.pinned import PinnedArena


class CudaAdapterMemory:
    """The adapters' memory, and the streams on which adapters are copied and merged.

    Reading and merging an adapter on a loader thread can take many kernels. They
    run on a stream of their own, so no pass is queued behind all of them.
    """

    def __init__(
        self, device: torch.device, adapter_budget: int, host_budget: int, slots: int
    ) -> None:
        """`adapter_budget` and `host_budget` are bytes for the adapters in `slots` slots."""
        self._device = device
        self._host = PinnedArena(PinnedArena.size_for(host_budget, adapter_budget))
        size = DeviceArena.size_for(adapter_budget, slots)
        self._adapters = DeviceAdapters(DeviceArena(size, device), CudaCopies(device))
        self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Zeros in pinned host memory, uint8 [nbytes]; in ordinary memory if the arena is full."""
        return self._host.zeros(nbytes)

    def prepare(self, adapter: PackedAdapter) -> bool:
        """Begins or continues to copy an adapter to the device; True once it is there."""
        return self._adapters.prepare(adapter)

    def take(
        self, adapter: PackedAdapter, on_move: Callable[[PackedAdapter], None]
    ) -> PackedAdapter:
        """The adapter on the device; `on_move` is called when it is moved there."""
        return self._adapters.take(adapter, on_move)

    def free(self, placed: PackedAdapter) -> None:
        """Frees an adapter's memory on the device."""
        self._adapters.free(placed)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which this thread's work on the device runs on a stream of its own."""
        with torch.cuda.stream(self._aside):
            yield
        self._aside.synchronize()

    def hand_over(self, merged: Merged) -> None:
        """Notes that passes use the memory of dense matrices that were computed aside.

        Without this the allocator would give the memory to the next merge as soon as the matrices
        are dropped, while a pass may still read them.
        """
        passes = torch.cuda.current_stream(self._device)
        for matrix in merged.matrices.values():
            matrix.weight.record_stream(passes)
            if matrix.bias is not None:
                matrix.bias.record_stream(passes)
