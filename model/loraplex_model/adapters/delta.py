"""The change that an adapter makes to a base model, as values: one type for each sort of site.

Every kind of adapter (LoRA, DoRA, IA3, BitFit, ...) is expressed by these four types; each type
states its formula. If several adapters act on one row with weights w, their changes are added:

    gain = 1 + sum w (gain_i - 1),  in_gain likewise;  low-rank terms, biases and rows times w

(If one adapter has a `gain` and another an `in_gain` at the same module, both are applied.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from loraplex_model.base.config import LAYER_SITES, MODEL_SITES, PROJECTIONS, Site

if TYPE_CHECKING:  # sizes of adapters are computed from these types without torch
    import torch


class Activation(IntEnum):
    """Activation between the two matrices of a bottleneck; the numbers of `cpu/activations.h`."""

    NONE = 0
    RELU = 1
    SILU = 2
    GELU = 3
    """The exact GELU, by the error function."""
    GELU_TANH = 4
    TANH = 5
    SIGMOID = 6
    LEAKY_RELU = 7
    """Slope 0.01 below zero."""


class Reads(IntEnum):
    """Input of a bottleneck, whose output is added to the residual stream; as in `cpu/sites.h`."""

    NORMED = 0
    """The normed state that the block (attention or MLP) reads: parallel adapters."""
    OUTPUT = 1
    """The block's output."""
    STREAM = 2
    """The residual stream after the block's output was added to it."""
    INCOMING = 3
    """The residual stream as it comes to the block, before the block's norm."""


def _matrix(entry: str) -> Mapping[str, Any]:
    return {"entry": entry, "is_matrix": True}


def _vector(entry: str) -> Mapping[str, Any]:
    return {"entry": entry, "is_matrix": False}


@dataclass(frozen=True, slots=True)
class ProjectionDelta:
    """Change of one of a layer's seven matrices.

        y = gain * (W (in_gain * x) + base bias) + B (A x) + bias

    Every part is optional; a and b come together.

    Attributes:
        a: [r, in].
        b: [r, out], transposed; the adapter's scale (and gain) is folded in.
        gain: float32 [out].
        in_gain: float32 [in].
        bias: float32 [out].
    """

    a: torch.Tensor | None = field(default=None, metadata=_matrix("a"))
    b: torch.Tensor | None = field(default=None, metadata=_matrix("b"))
    gain: torch.Tensor | None = field(default=None, metadata=_vector("gain"))
    in_gain: torch.Tensor | None = field(default=None, metadata=_vector("in_gain"))
    bias: torch.Tensor | None = field(default=None, metadata=_vector("bias"))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A [r, in] and B transposed [r, out]; None without a low-rank part."""
        return None if self.a is None or self.b is None else (self.a, self.b)


@dataclass(frozen=True, slots=True)
class RowsDelta:
    """Change of the embeddings or of the head, whose weights have one row per token.

        embeddings   x[t] += A[t] B + rows[t]
        head         logits += B (A x),  logits[t] += rows[t] . x

    Every part is optional; a and b come together, and so do rows and token_ids.

    Attributes:
        a: [vocab, r] at the embeddings, [r, hidden] at the head.
        b: [r, hidden] at the embeddings, [r, vocab] at the head; the scale is folded in.
        rows: [n, hidden], added to the rows of the tokens in token_ids.
        token_ids: int32 [n], ascending.
    """

    a: torch.Tensor | None = field(default=None, metadata=_matrix("a"))
    b: torch.Tensor | None = field(default=None, metadata=_matrix("b"))
    rows: torch.Tensor | None = field(default=None, metadata=_matrix("rows"))
    token_ids: torch.Tensor | None = field(default=None, metadata=_vector("token_ids"))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B as described for the class; None without a low-rank part."""
        return None if self.a is None or self.b is None else (self.a, self.b)

    @property
    def changed_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token ids [n] and what is added to their rows [n, hidden]; None if there are none."""
        if self.token_ids is None or self.rows is None:
            return None
        return self.token_ids, self.rows


@dataclass(frozen=True, slots=True)
class NormDelta:
    """Change of a norm: `y = (base weight + weight) * normed(x) + base bias + bias`.

    Attributes:
        weight: float32 [width], added to the base's weight, or None.
        bias: float32 [width], added to the base's bias, or None; for norms with a bias only.
    """

    weight: torch.Tensor | None = field(default=None, metadata=_vector("bias"))
    bias: torch.Tensor | None = field(default=None, metadata=_vector("hidden_bias"))


@dataclass(frozen=True, slots=True)
class BottleneckDelta:
    """A small network whose output is added to the residual stream after a block.

        stream += up(activation(down(input) + down_bias)) + up_bias

    Attributes:
        down: [width, hidden].
        up: [width, hidden], transposed; the adapter's scale is folded in, as into up_bias.
        up_bias: float32 [hidden], or None.
        down_bias: float32 [width], or None.
        activation: the function between the two matrices.
        reads: which state is the input.
    """

    down: torch.Tensor = field(metadata=_matrix("a"))
    up: torch.Tensor = field(metadata=_matrix("b"))
    up_bias: torch.Tensor | None = field(default=None, metadata=_vector("bias"))
    down_bias: torch.Tensor | None = field(default=None, metadata=_vector("hidden_bias"))
    activation: Activation = Activation.NONE
    reads: Reads = Reads.NORMED


SiteDelta = ProjectionDelta | RowsDelta | NormDelta | BottleneckDelta
"""Change of one site; `delta_type` says which of the four types a site has."""

_Delta = TypeVar("_Delta", ProjectionDelta, RowsDelta, NormDelta, BottleneckDelta)

_TYPES: Mapping[str, type[SiteDelta]] = {
    name: ProjectionDelta
    if name in PROJECTIONS
    else BottleneckDelta
    if name.endswith("_bottleneck")
    else NormDelta
    if name.endswith("norm")
    else RowsDelta
    for name in (*LAYER_SITES, *MODEL_SITES)
}


def delta_type(name: str) -> type[SiteDelta]:
    """The type of the change at the sites of this name, for instance "q_proj"."""
    return _TYPES[name]


class TensorField(NamedTuple):
    """A tensor of a change.

    Attributes:
        name: attribute of the change's type.
        entry: field of `table.ENTRY` that holds the tensor's address.
        is_matrix: True if the tensor is packed in the compute dtype; vectors keep float32, token
            ids int32.
    """

    name: str
    entry: str
    is_matrix: bool


def tensor_fields(kind: type[SiteDelta]) -> Iterator[TensorField]:
    """The tensors that a change of this type may have, in the order in which they are packed."""
    for each in fields(kind):
        if each.metadata:
            yield TensorField(each.name, **each.metadata)


def vector_fields() -> frozenset[str]:
    """Names of the fields of all four types that are packed as vectors, 4 bytes an element."""
    return frozenset(
        name
        for kind in get_args(SiteDelta)
        for name, _, is_matrix in tensor_fields(kind)
        if not is_matrix
    )


def is_empty(change: SiteDelta) -> bool:
    """True if the change has no tensor, so that it changes nothing."""
    return all(getattr(change, name) is None for name, _, _ in tensor_fields(type(change)))


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Tokens before every prompt, given by their embeddings or by their keys and values.

    Attributes:
        embeddings: [n, hidden], or None.
        keys, values: [layers, n, kv_heads, head_dim] as stored in the KV cache (keys are not
            rotated), or None.
    """

    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of virtual tokens."""
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        return 0 if self.keys is None else self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """The whole change that one adapter makes: changes by site, and virtual tokens."""

    sites: Mapping[Site, SiteDelta] = field(default_factory=dict)
    virtual: VirtualTokens | None = None

    def at(self, site: Site, kind: type[_Delta]) -> _Delta | None:
        """The change at a site, whose type is `kind`; None if the adapter changes nothing there."""
        found = self.sites.get(site)
        assert found is None or isinstance(found, kind), f"{site} has a {type(found).__name__}"
        return found


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """Low-rank change of one module as PEFT writes it: `scale * B @ A`.

    `a` is [r, in], `b` is [out, r]; both of any floating dtype.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def low_rank(site: Site, a: torch.Tensor, b: torch.Tensor) -> ProjectionDelta | RowsDelta:
    """The change `B A` of a projection, the embeddings or the head, and nothing else.

    Shapes are those of `ProjectionDelta` and `RowsDelta`.
    """
    return RowsDelta(a, b) if site[1] in MODEL_SITES else ProjectionDelta(a, b)


def lora(modules: Mapping[Site, LoraFactors]) -> AdapterDelta:
    """A plain LoRA adapter on projections and the head; differentiable in the factors.

    Each scale is folded into B in B's own dtype.
    """
    return AdapterDelta({site: low_rank(site, m.a, m.b.T * m.scale) for site, m in modules.items()})
