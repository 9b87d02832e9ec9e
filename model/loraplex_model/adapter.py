"""Adapters in memory: one flat tensor each, and a table of pointers that the kernels read.

    y = W x + sum over the row's mix of  weight * B (A x)

`A` is [r, in] and `B` is kept transposed, [r, out], with the scale (alpha / r, or alpha / sqrt(r))
folded in; both row-major, one module after the other, with no padding to a common rank and nothing
for a module that the adapter leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.config import PROJECTIONS, DecoderConfig

ALIGNMENT = 64
"""Every matrix starts at a multiple of this many bytes: a cache line, a full AVX-512 vector."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's delta as the file holds it: `scale * B @ A`.

    `a` is [r, in], `b` is [out, r], any floating dtype.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter, ready for the kernels.

    Attributes:
        data: flat, of the compute dtype, on the model's device.
        offsets: int64 [layers, 7, 2], element offsets of A and of transposed B into `data`.
        ranks: int32 [layers, 7]; 0 where the module is untouched.
    """

    data: torch.Tensor
    offsets: NDArray[np.int64]
    ranks: NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.data.numel() * self.data.element_size()

    def factors(
        self, layer: int, projection: int, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views `(A [r, in], B transposed [r, out])` of a module of `shape` (in, out).

        None at rank 0.
        """
        rank = int(self.ranks[layer, projection])
        if rank == 0:
            return None
        a_at, b_at = (int(x) for x in self.offsets[layer, projection])
        fan_in, fan_out = shape
        a = self.data[a_at : a_at + rank * fan_in].view(rank, fan_in)
        b = self.data[b_at : b_at + rank * fan_out].view(rank, fan_out)
        return a, b


def pack(
    modules: Mapping[tuple[int, str], LoraFactors],
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> PackedAdapter:
    """Packs the deltas of `(layer, module name)` into one tensor, folding each scale into B.

    The fold is computed in float32 and rounded once. Shapes must already be right.
    """
    unit = ALIGNMENT // torch.empty((), dtype=dtype).element_size()
    offsets = np.zeros((config.num_layers, len(PROJECTIONS), 2), np.int64)
    ranks = np.zeros((config.num_layers, len(PROJECTIONS)), np.int32)
    pieces: list[tuple[int, torch.Tensor]] = []
    end = 0
    for (layer, name), lora in sorted(modules.items()):
        projection = PROJECTIONS.index(name)
        ranks[layer, projection] = lora.a.shape[0]
        if lora.a.shape[0] == 0:
            continue
        scaled_b = (lora.b.float() * lora.scale).T
        for which, matrix in enumerate((lora.a, scaled_b)):
            offsets[layer, projection, which] = end
            pieces.append((end, matrix))
            end += -(-matrix.numel() // unit) * unit
    data = torch.zeros(end, dtype=dtype)
    for at, matrix in pieces:
        data[at : at + matrix.numel()] = matrix.reshape(-1).to(dtype)
    return PackedAdapter(data.to(device), offsets, ranks)


class AdapterTable:
    """The resident adapters by slot, and the pointers to their matrices.

    Attributes:
        a_pointers, b_pointers: uint64 [slots, layers, 7], addresses; 0 where there is none.
        ranks: int32 [slots, layers, 7].
        max_ranks: int32 [slots], the largest rank of each slot.
        adapters: the owners of the memory that the pointers point into.
    """

    def __init__(self, num_slots: int, config: DecoderConfig) -> None:
        shape = (num_slots, config.num_layers, len(PROJECTIONS))
        self.a_pointers = np.zeros(shape, np.uint64)
        self.b_pointers = np.zeros(shape, np.uint64)
        self.ranks = np.zeros(shape, np.int32)
        self.max_ranks = np.zeros(num_slots, np.int32)
        self.adapters: list[PackedAdapter | None] = [None] * num_slots

    def publish(self, slot: int, adapter: PackedAdapter) -> None:
        """Points `slot`, which must be free, to the adapter."""
        assert self.adapters[slot] is None, f"slot {slot} is taken"
        address = np.uint64(adapter.data.data_ptr())
        size = np.uint64(adapter.data.element_size())
        present = adapter.ranks > 0
        pointers = address + adapter.offsets.astype(np.uint64) * size
        self.a_pointers[slot] = np.where(present, pointers[..., 0], np.uint64(0))
        self.b_pointers[slot] = np.where(present, pointers[..., 1], np.uint64(0))
        self.ranks[slot] = adapter.ranks
        self.max_ranks[slot] = adapter.ranks.max()
        self.adapters[slot] = adapter

    def remove(self, slot: int) -> None:
        """Frees the slot; no row may be using it."""
        self.a_pointers[slot] = 0
        self.b_pointers[slot] = 0
        self.ranks[slot] = 0
        self.max_ranks[slot] = 0
        self.adapters[slot] = None
