"""The plan of a pass in device memory, as the LoRA kernels take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_model.decoder.cuda.plan import ChunkPlan, PlanCapacity


@dataclass(frozen=True, slots=True)
class LoraPass:
    """The adapters of a pass's rows: a `ChunkPlan` and the table of addresses, on the device.

    The tensors hold the arrays of `ChunkPlan.arrays` at their front. Grids depend on their lengths
    alone, so that a captured graph covers every plan that fits the capacity.

    Attributes:
        entries: int64 [slots, sites, 10], see `DeviceTable`.
        chunk_begin, chunk_end: int32 [capacity.rows].
        chunk_count: int32 [1].
        term_start: int32 [capacity.rows + 1].
        term_slot, term_weight, term_row: int32, float32, int32 [capacity.terms].
        row_chunk: int32 [capacity.rows].
        capacity: sizes of the buffers; also those of A x.
    """

    entries: torch.Tensor
    chunk_begin: torch.Tensor
    chunk_end: torch.Tensor
    chunk_count: torch.Tensor
    term_start: torch.Tensor
    term_slot: torch.Tensor
    term_weight: torch.Tensor
    term_row: torch.Tensor
    row_chunk: torch.Tensor
    capacity: PlanCapacity

    @property
    def sites(self) -> int:
        """Number of sites of a slot in `entries`."""
        return self.entries.shape[1]

    @staticmethod
    def of(plan: ChunkPlan, entries: torch.Tensor) -> LoraPass:
        """The plan in new tensors on the device of `entries`, with no room to spare."""
        parts = {
            name: torch.from_numpy(array).to(entries.device)
            for name, array in plan.arrays().items()
        }
        return LoraPass(entries, capacity=plan.capacity, **parts)

    @staticmethod
    def at(
        buffers: Mapping[str, torch.Tensor], entries: torch.Tensor, capacity: PlanCapacity
    ) -> LoraPass:
        """A pass whose arrays lie in `buffers`, by name; each has its length of `capacity`."""
        for name, length in capacity.lengths().items():
            assert len(buffers[name]) == length, f"{name}: {len(buffers[name])} is not {length}"
        return LoraPass(entries, capacity=capacity, **buffers)

    @staticmethod
    def empty(entries: torch.Tensor, capacity: PlanCapacity) -> LoraPass:
        """A pass without chunks, whose buffers have the lengths of `capacity`."""
        buffers = {
            name: torch.zeros(
                length,
                dtype=torch.float32 if name == "term_weight" else torch.int32,
                device=entries.device,
            )
            for name, length in capacity.lengths().items()
        }
        return LoraPass(entries, capacity=capacity, **buffers)

    def load(self, plan: ChunkPlan) -> None:
        """Copies a plan that fits into the tensors, in the order of the current stream."""
        assert plan.fits(self.capacity), f"{plan.capacity} does not fit {self.capacity}"
        for name, array in plan.arrays(self.capacity.rows).items():
            tensor: torch.Tensor = getattr(self, name)
            tensor[: len(array)].copy_(torch.from_numpy(np.ascontiguousarray(array)))
