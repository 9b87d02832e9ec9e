"""Adapters in memory: what they change, site by site, and the table of pointers to it.

Whatever kind an adapter is of, at a projection it comes down to one formula,

    y = gain * (W (in_gain * x) + base bias) + B (A x) + bias

of which it fills what it needs: LoRA A and B (its scale folded into B), DoRA also `gain`, IA3
`gain` or `in_gain`, trained biases `bias`. Embeddings, head, norms and bottlenecks are sites of the
same table. Several adapters on one row, weighted w, add up what each would change:

    gain = 1 + sum w (gain_i - 1),  in_gain likewise,  deltas and biases times w

(Where one has a `gain` and another an `in_gain` at the same module, the two are multiplied.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from loraplex_model.config import DecoderConfig, Site

if TYPE_CHECKING:
    from loraplex_model.merge import DenseMatrices, Merged

ALIGNMENT = 64
"""Everything starts at a multiple of this many bytes: a cache line, a full AVX-512 vector."""


class Activation(IntEnum):
    """What a bottleneck applies between its two matrices."""

    NONE = 0
    RELU = 1
    SILU = 2
    GELU = 3
    """The exact one, by the error function."""
    GELU_TANH = 4
    TANH = 5
    SIGMOID = 6
    LEAKY_RELU = 7
    """Slope 0.01 below zero."""


class Reads(IntEnum):
    """What a bottleneck takes as its input; what comes out is added to the residual stream."""

    NORMED = 0
    """The normed state that the block (attention or MLP) reads: parallel adapters."""
    OUTPUT = 1
    """The block's output."""
    STREAM = 2
    """The residual stream after the block's output was added to it."""
    INCOMING = 3
    """The residual stream as it comes to the block, before the block's norm."""


@dataclass(frozen=True, slots=True)
class SiteDelta:
    """What an adapter changes at one site. Everything is optional; matrices are of any float type.

    Attributes:
        a: [r, in]. At embed_tokens [vocab, r]: a token's row is the reduced vector. At a bottleneck
            the down projection [width, in].
        b: [r, out], transposed, with scale (and gain) folded in. At a bottleneck up, transposed.
        gain: float32 [out]; in_gain: float32 [in].
        bias: float32 [out], added. At a norm: what is added to its weight.
        hidden_bias: float32 [width], of a bottleneck's down projection.
        token_ids: int32 [n], ascending, and rows: [n, hidden]: what is added to these tokens'
            rows of the embedding or the head.
        activation, reads: of a bottleneck.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    in_gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    activation: Activation = Activation.NONE
    reads: Reads = Reads.NORMED

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return all(getattr(self, name) is None for name in _TENSORS)


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Tokens that stand before every prompt: by their embeddings, or by their keys and values.

    Attributes:
        embeddings: [n, hidden], or None.
        keys, values: [layers, n, kv_heads, head_dim], as they go into the cache (keys are not
            rotated), or None.
    """

    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        return 0 if self.keys is None else self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """All that an adapter changes, site by site."""

    sites: Mapping[Site, SiteDelta] = field(default_factory=dict)
    virtual: VirtualTokens | None = None

    def at(self, site: Site) -> SiteDelta | None:
        """What it changes at a site; None if nothing."""
        return self.sites.get(site)


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's delta as PEFT writes it: `scale * B @ A`.

    `a` is [r, in], `b` is [out, r], any floating dtype.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def lora(modules: Mapping[Site, LoraFactors]) -> AdapterDelta:
    """A plain LoRA adapter, each scale folded into B in B's own type; differentiable."""
    return AdapterDelta({site: SiteDelta(a=m.a, b=m.b.T * m.scale) for site, m in modules.items()})


_STORED = ("a", "b", "rows")  # in the compute dtype; all else keeps its own
_VECTORS = ("gain", "in_gain", "bias", "hidden_bias", "token_ids")
_TENSORS = (*_STORED, *_VECTORS)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the packed bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter as one flat tensor, every part exactly as large as it is.

    Attributes:
        data: uint8, on the host (pinned, where a device copies from it) or on the device.
        places: by site and attribute of `SiteDelta`; virtual tokens under ("virtual", attribute).
        options: activation and input of the bottlenecks.
    """

    data: torch.Tensor
    places: Mapping[Site, Mapping[str, _Place]]
    virtual_places: Mapping[str, _Place]
    options: Mapping[Site, tuple[Activation, Reads]]

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, and on the device."""
        return self.data.numel()

    @property
    def virtual_tokens(self) -> int:
        """Positions that it puts before every prompt."""
        virtual = self.virtual
        return 0 if virtual is None else virtual.count

    @property
    def virtual(self) -> VirtualTokens | None:
        """Its virtual tokens as views of `data`, if it has any."""
        if not self.virtual_places:
            return None
        return VirtualTokens(**{name: self._at(p) for name, p in self.virtual_places.items()})

    def unpack(self) -> AdapterDelta:
        """What it changes, as views of `data`."""
        return AdapterDelta(
            {
                site: SiteDelta(
                    **{name: self._at(place) for name, place in places.items()},
                    activation=self.options[site][0],
                    reads=self.options[site][1],
                )
                for site, places in self.places.items()
            },
            self.virtual,
        )

    def to(self, device: torch.device) -> PackedAdapter:
        """The same on another device; itself if it is there."""
        if self.data.device == device:
            return self
        data = self.data.to(device, non_blocking=True)
        return PackedAdapter(data, self.places, self.virtual_places, self.options)

    def _at(self, place: _Place) -> torch.Tensor:
        strides = [1]
        for length in reversed(place.shape[1:]):
            strides.append(strides[-1] * length)
        whole = self.data.view(place.dtype)  # its end is aligned, as all that is in it
        return whole.as_strided(place.shape, strides[::-1], place.start // place.dtype.itemsize)


def pack(delta: AdapterDelta, dtype: torch.dtype, *, pin: bool = False) -> PackedAdapter:
    """Lays an adapter's tensors back to back in host memory, matrices in `dtype`.

    `pin` takes memory that a CUDA device can copy from while it computes. Shapes must be right.
    """
    end = 0
    pieces: list[tuple[_Place, torch.Tensor]] = []

    def put(tensor: torch.Tensor, kind: torch.dtype) -> _Place:
        nonlocal end
        place = _Place(end, tuple(tensor.shape), kind)
        pieces.append((place, tensor))
        end += -(-tensor.numel() * kind.itemsize // ALIGNMENT) * ALIGNMENT
        return place

    places: dict[Site, dict[str, _Place]] = {}
    options: dict[Site, tuple[Activation, Reads]] = {}
    for site, change in delta.sites.items():
        found = {}
        for name in _TENSORS:
            tensor = getattr(change, name)
            if tensor is not None and tensor.numel():
                kind = dtype if name in _STORED else tensor.dtype
                assert name in _STORED or kind in (torch.float32, torch.int32), name
                found[name] = put(tensor, kind)
        if found:
            places[site] = found
            options[site] = (change.activation, change.reads)
    virtual = {}
    for attribute in fields(VirtualTokens) if delta.virtual is not None else ():
        tensor = getattr(delta.virtual, attribute.name)
        if tensor is not None:
            virtual[attribute.name] = put(tensor, dtype)
    data = torch.zeros(end, dtype=torch.uint8, pin_memory=pin)
    packed = PackedAdapter(data, places, virtual, options)
    for place, tensor in pieces:
        packed._at(place).copy_(tensor)
    return packed


ENTRY = np.dtype(
    [(name, np.uint64) for name in ("a", "b", "rows", *_VECTORS)]
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


def _uses(name: str, places: Mapping[str, _Place]) -> int:
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
