"""The slot table: for each slot and site, the addresses of the tensors of the slot's adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.adapters.delta import AdapterDelta, delta_type, tensor_fields
from loraplex_model.adapters.pack import PackedAdapter
from loraplex_model.base.config import FUSED, DecoderConfig, Site


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A fused matrix [out, in] merged with an adapter; `bias` is float32 [out], or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Size of matrix and bias in bytes."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


DenseMatrices = Mapping[tuple[int, str], DenseMatrix]
"""Dense matrices by layer and name of the fused matrix."""


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapter's dense matrices in the layout of one decoder.

    Attributes:
        matrices: for the decoder in torch; empty for the native one.
        addresses: uint64 [layers, 4], of the native decoder's matrices; zeros for the other.
        kept: the owners of the memory behind `addresses`.
    """

    matrices: DenseMatrices
    addresses: NDArray[np.uint64]
    nbytes: int
    kept: tuple[object, ...] = ()


_ADDRESSES = ("a", "b", "rows", "gain", "in_gain", "bias", "hidden_bias", "token_ids")
_NUMBERS = ("rank", "count", "activation", "reads")
ENTRY = np.dtype([(n, np.uint64) for n in _ADDRESSES] + [(n, np.int32) for n in _NUMBERS])
"""One site of one adapter as the kernels read it: addresses (0: absent) and numbers.

This is the struct `Entry` of `cpu/adapters.h`. `rank` is the number of rows of b, `count` that of
token_ids; `TensorField.entry` says which tensor of a change each address points to.
"""


_FUSED_OF = {name: fused for fused, names in FUSED.items() for name in names}


class Uses(IntFlag):
    """The sorts of changes that an adapter makes, so that a pass skips steps that no row uses.

    The bits of `SlotTable.uses`, and the enum `Use` of `cpu/adapters.h`.
    """

    FACTORS = 1
    GAIN = 2
    IN_GAIN = 4
    NORM = 8
    BOTTLENECK = 16
    EMBEDDING = 32
    HEAD = 64


class SlotTable:
    """The resident adapters by slot, and the addresses of their tensors for the kernels.

    Attributes:
        entries: `ENTRY` [slots, sites], in the order of `DecoderConfig.site_index`.
        max_ranks: int32 [slots], the largest rank at a projection (of one expert) or the head.
        uses: int32 [slots], bits of `Uses`.
        prompts: uint64 [slots], addresses of virtual tokens' embeddings.
        prompt_counts: int32 [slots], number of rows of these embeddings.
        merged: uint64 [slots, layers, 4], addresses of dense matrices (`Matrix` of cpu/matmul.h)
            that replace qkv, o, gate_up and down for rows whose mix is this slot at weight 1.
        adapters: the owners of the memory that the addresses point into.
        changed: slots whose entries changed; a copy of the table elsewhere takes them from here.
    """

    def __init__(self, num_slots: int, config: DecoderConfig) -> None:
        self._config = config
        self.entries = np.zeros((num_slots, config.num_sites), ENTRY)
        self.max_ranks = np.zeros(num_slots, np.int32)
        self.uses = np.zeros(num_slots, np.int32)
        self.prompts = np.zeros(num_slots, np.uint64)
        self.prompt_counts = np.zeros(num_slots, np.int32)
        self.merged: NDArray[np.uint64] = np.zeros(
            (num_slots, config.num_layers, len(FUSED)), np.uint64
        )
        self.adapters: list[PackedAdapter | None] = [None] * num_slots
        self.changed: set[int] = set()
        self._merges: list[Merged | None] = [None] * num_slots
        self._deltas: dict[int, AdapterDelta] = {}

    def publish(self, slot: int, adapter: PackedAdapter) -> None:
        """Puts an adapter into `slot`, which must be free."""
        assert self.adapters[slot] is None, f"slot {slot} is taken"
        uses = rank = 0
        for site in adapter.places:
            entry = _entry(adapter, site)
            self.entries[slot, self._config.site_index(site)] = entry
            used = _uses(site[1], entry)
            uses |= used
            if used & (Uses.FACTORS | Uses.HEAD):
                experts = self._config.copies_of(_FUSED_OF.get(site[1], ""))
                rank = max(rank, int(entry["rank"]) // experts)
        if "embeddings" in adapter.virtual_places:
            place = adapter.virtual_places["embeddings"]
            self.prompts[slot] = adapter.data.data_ptr() + place.start
            self.prompt_counts[slot] = place.shape[0]
        self.max_ranks[slot], self.uses[slot] = rank, uses
        self.adapters[slot] = adapter
        self.changed.add(slot)

    def move(self, slot: int, adapter: PackedAdapter) -> None:
        """Notes that the bytes of the slot's adapter lie elsewhere now, as those of `adapter`."""
        before = self.adapters[slot]
        assert before is not None, f"slot {slot} is empty"
        distance = np.int64(adapter.data.data_ptr() - before.data.data_ptr())
        entries = self.entries[slot]
        for name in _ADDRESSES:
            at = entries[name].view(np.int64)
            at[at != 0] += distance
        if self.prompts[slot]:
            self.prompts[slot : slot + 1].view(np.int64)[:] += distance
        self.adapters[slot] = adapter
        self._deltas.pop(slot, None)
        self.changed.add(slot)

    def remove(self, slot: int) -> None:
        """Frees a slot, which no row may be using."""
        self.remove_merge(slot)
        self.entries[slot] = np.zeros((), ENTRY)
        self.max_ranks[slot] = self.uses[slot] = 0
        self.prompts[slot] = self.prompt_counts[slot] = 0
        self.adapters[slot] = None
        self._deltas.pop(slot, None)
        self.changed.add(slot)

    def publish_merge(self, slot: int, merged: Merged) -> None:
        """Lets rows of the slot use dense matrices."""
        assert self.adapters[slot] is not None, f"slot {slot} is empty"
        self.merged[slot] = merged.addresses
        self._merges[slot] = merged

    def remove_merge(self, slot: int) -> None:
        """Drops the slot's dense matrices."""
        self.merged[slot] = 0
        self._merges[slot] = None

    def delta(self, slot: int) -> AdapterDelta:
        """The changes of the slot's adapter, as views of its packed tensor."""
        if slot not in self._deltas:
            adapter = self.adapters[slot]
            assert adapter is not None, f"slot {slot} is empty"
            self._deltas[slot] = adapter.unpack()
        return self._deltas[slot]

    def dense(self, mix: Sequence[tuple[int, float]]) -> DenseMatrices | None:
        """The dense matrices for rows with this mix; None unless it is one slot at weight 1."""
        if len(mix) != 1 or mix[0][1] != 1.0:
            return None
        merged = self._merges[mix[0][0]]
        return None if merged is None else merged.matrices


def _entry(adapter: PackedAdapter, site: Site) -> np.void:
    """The `ENTRY` of an adapter's change at a site."""
    entry: np.void = np.zeros(1, ENTRY)[0]
    places = adapter.places[site]
    for name, at, _ in tensor_fields(delta_type(site[1])):
        if (place := places.get(name)) is not None:
            entry[at] = adapter.data.data_ptr() + place.start
            if at in ("b", "token_ids"):
                entry["rank" if at == "b" else "count"] = place.shape[0]
    for name, value in adapter.options.get(site, {}).items():
        entry[name] = value
    return entry


def _uses(name: str, entry: np.void) -> Uses:
    if name == "embed_tokens":
        return Uses.EMBEDDING
    if name == "lm_head":
        return Uses.HEAD
    if name.endswith("norm"):
        return Uses.NORM
    if name.endswith("_bottleneck"):
        return Uses.BOTTLENECK
    bits = Uses.FACTORS if entry["b"] else Uses(0)
    if entry["gain"] or entry["bias"]:
        bits |= Uses.GAIN
    return bits | Uses.IN_GAIN if entry["in_gain"] else bits
