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

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from loraplex_model.base.config import Site


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


STORED = ("a", "b", "rows")
"""Fields of `SiteDelta` that are packed in the compute dtype."""
VECTORS = ("gain", "in_gain", "bias", "hidden_bias", "token_ids")
"""Fields of `SiteDelta` that keep their own dtype: float32, or int32 for token ids."""
TENSORS = (*STORED, *VECTORS)
"""All tensor fields of `SiteDelta`, in the order in which they are packed."""


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
        return all(getattr(self, name) is None for name in TENSORS)


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
