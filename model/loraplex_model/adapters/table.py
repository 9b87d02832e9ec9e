"""The adapter table: for each slot and site, the addresses of what the slot's adapter changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.delta import VECTORS, AdapterDelta
from loraplex_model.adapters.pack import PackedAdapter, Place
from loraplex_model.base.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A fused matrix [out, in] with an adapter in it; `bias` float32 [out], or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


DenseMatrices = Mapping[tuple[int, str], DenseMatrix]
"""By (layer, name of the fused matrix)."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a decoder keeps of an adapter's dense matrices, in its own layout.

    Attributes:
        matrices: for the decoder in torch; empty for the native one.
        addresses: uint64 [layers, 4], of the native decoder's matrices; zeros for the other.
        kept: whatever owns the memory behind `addresses`.
    """

    matrices: DenseMatrices
    addresses: NDArray[np.uint64]
    nbytes: int
    kept: tuple[object, ...] = ()


ENTRY = np.dtype(
    [(name, np.uint64) for name in ("a", "b", "rows", *VECTORS)]
    + [(name, np.int32) for name in ("rank", "count", "activation", "reads")]
)
"""One site of one adapter as the kernels read it: addresses (0: nothing) and sizes. `Entry` of
cpu/adapters.h."""


class Uses:
    """What an adapter needs besides A and B of the projections, so that others pay nothing for it.

    The bits of `AdapterTable.uses`; they are repeated in cpu/adapters.h.
    """

    FACTORS = 1
    GAIN = 2
    IN_GAIN = 4
    NORM = 8
    BOTTLENECK = 16
    EMBEDDING = 32
    HEAD = 64


class AdapterTable:
    """The resident adapters by slot, and the pointers to what they change.

    Attributes:
        entries: `ENTRY` [slots, sites], in the order of `DecoderConfig.site_index`.
        max_ranks: int32 [slots], the largest rank of a projection or the head.
        uses: int32 [slots], bits of `Uses`.
        prompts: uint64 [slots], addresses of virtual tokens' embeddings.
        merged: uint64 [slots, layers, 4], addresses of dense matrices (`Matrix` of cpu/matmul.h)
            that stand for qkv, o, gate_up and down of rows that use nothing but this slot, at
            weight 1.
        adapters: the owners of the memory that the pointers point into.
    """

    def __init__(self, num_slots: int, config: DecoderConfig) -> None:
        self._config = config
        self.entries = np.zeros((num_slots, config.num_sites), ENTRY)
        self.max_ranks = np.zeros(num_slots, np.int32)
        self.uses = np.zeros(num_slots, np.int32)
        self.prompts = np.zeros(num_slots, np.uint64)
        self.merged: NDArray[np.uint64] = np.zeros((num_slots, config.num_layers, 4), np.uint64)
        self.adapters: list[PackedAdapter | None] = [None] * num_slots
        self._merges: list[Merged | None] = [None] * num_slots
        self._deltas: dict[int, AdapterDelta] = {}

    def publish(self, slot: int, adapter: PackedAdapter) -> None:
        """Points `slot`, which must be free, to the adapter."""
        assert self.adapters[slot] is None, f"slot {slot} is taken"
        address = adapter.data.data_ptr()
        entries = self.entries[slot]
        uses = rank = 0
        for site, places in adapter.places.items():
            entry = entries[self._config.site_index(site)]
            for name, place in places.items():
                entry[name] = address + place.start
            if "b" in places:
                entry["rank"] = places["b"].shape[0]
            if "token_ids" in places:
                entry["count"] = places["token_ids"].shape[0]
            entry["activation"], entry["reads"] = adapter.options[site]
            used = _uses(site[1], places)
            uses |= used
            if used & (Uses.FACTORS | Uses.HEAD):
                rank = max(rank, int(entry["rank"]))
        if "embeddings" in adapter.virtual_places:
            self.prompts[slot] = address + adapter.virtual_places["embeddings"].start
        self.max_ranks[slot], self.uses[slot] = rank, uses
        self.adapters[slot] = adapter

    def remove(self, slot: int) -> None:
        """Frees the slot; no row may be using it."""
        self.remove_merge(slot)
        self.entries[slot] = np.zeros((), ENTRY)
        self.max_ranks[slot] = self.uses[slot] = 0
        self.prompts[slot] = 0
        self.adapters[slot] = None
        self._deltas.pop(slot, None)

    def publish_merge(self, slot: int, merged: Merged) -> None:
        """Gives the slot dense matrices."""
        assert self.adapters[slot] is not None, f"slot {slot} is empty"
        self.merged[slot] = merged.addresses
        self._merges[slot] = merged

    def remove_merge(self, slot: int) -> None:
        """Takes the dense matrices away."""
        self.merged[slot] = 0
        self._merges[slot] = None

    def delta(self, slot: int) -> AdapterDelta:
        """What the slot's adapter changes, as views of its packed tensor."""
        if slot not in self._deltas:
            adapter = self.adapters[slot]
            assert adapter is not None, f"slot {slot} is empty"
            self._deltas[slot] = adapter.unpack()
        return self._deltas[slot]

    def dense(self, mix: Sequence[tuple[int, float]]) -> DenseMatrices | None:
        """The dense matrices of rows with that mix: only a slot alone at weight 1 has any."""
        if len(mix) != 1 or mix[0][1] != 1.0:
            return None
        merged = self._merges[mix[0][0]]
        return None if merged is None else merged.matrices


def _uses(name: str, places: Mapping[str, Place]) -> int:
    if name == "embed_tokens":
        return Uses.EMBEDDING
    if name == "lm_head":
        return Uses.HEAD
    if name.endswith("norm"):
        return Uses.NORM
    if name.endswith("_bottleneck"):
        return Uses.BOTTLENECK
    bits = Uses.FACTORS if "b" in places else 0
    if "gain" in places or "bias" in places:
        bits |= Uses.GAIN
    return bits | (Uses.IN_GAIN if "in_gain" in places else 0)
