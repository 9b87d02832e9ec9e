"""The decoder as functions, shared by serving and training.

Rows are flat, [T, hidden]. Weights come from `BaseWeights`; the product with a base matrix, the
attention and the rows' adapters are arguments.

On the CPU activations are float32 whatever the compute dtype is: bfloat16 then is the type in which
norms, embeddings, KV and adapters are *stored*, and products are computed in float32. On CUDA
activations have the compute dtype and are rounded where Hugging Face rounds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from loraplex_model.adapters import mix, spans
from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.config import FUSED, MODEL, DecoderConfig, Site
from loraplex_model.base.weights import BaseWeights, LayerWeights
from loraplex_model.decoder.attention import Attention
from loraplex_model.ops import autograd, rope
from loraplex_model.ops.autograd import Recompute
from loraplex_model.ops.linear import BaseLinear, by_tiles


def hidden_states(
    weights: BaseWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    groups: Sequence[RowGroup],
    linear: BaseLinear,
    attention: Attention,
    checkpointing: bool = False,
) -> torch.Tensor:
    """The final, normed states [T, hidden] of `tokens` [T] at `positions` [T].

    With `checkpointing` only the states between layers are kept, and each layer is computed again
    in the backward pass (Chen et al., arXiv 1604.06174), with the same gradients bit for bit.
    """
    config = weights.config
    # float32 even if everything else is float64, since the angles' rounding is part of the model
    inv_freq = torch.tensor(config.rope_inv_freq, device=tokens.device)
    cos, sin = rope.tables(positions, inv_freq, config.rope_scale)
    x = mix.embedded(tokens, weights.embed, activation_dtype(weights.embed), groups)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)

    for i, layer in enumerate(weights.layers):
        block = _Layer(config, i, layer, groups, linear)
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(
                block, x, cos, sin, attention, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = block(x, cos, sin, attention)
    return _norm((MODEL, "norm"), weights.norm, x, config.rms_norm_eps, groups)[0]


def logits(
    weights: BaseWeights, hidden: torch.Tensor, groups: Sequence[RowGroup] = ()
) -> torch.Tensor:
    """Logits [R, vocab] of hidden states [R, hidden]; float32, or float64 if the states are.

    Row numbers in `groups` are indices into `hidden`.
    """
    base = autograd.wide(by_tiles(hidden, weights.lm_head.to(hidden.dtype)))
    return mix.add_head(base, hidden, groups)


def activation_dtype(stored: torch.Tensor) -> torch.dtype:
    """The type of activations for weights with the type and device of `stored`."""
    as_stored = stored.is_cuda or stored.dtype == torch.float64
    return stored.dtype if as_stored else torch.float32


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, Recompute | None]:
    """`weight * x / rms(x)` over the last axis, computed in float32 at least, in the type of x.

    Also returns how to recompute the result, if it is known. Differentiable in x and in the weight;
    with our own derivative if x alone needs a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad:
        return autograd.rms_norm(x, weight, eps)
    wide = autograd.wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype), None


def _norm(
    site: Site, weight: torch.Tensor, x: torch.Tensor, eps: float, groups: Sequence[RowGroup]
) -> tuple[torch.Tensor, Recompute | None]:
    """`rms_norm` with the groups' changes of the weight."""
    normed, recompute = rms_norm(x, weight, eps)
    for rows, own in mix.norm_weights(site, weight, groups):
        normed = normed.index_copy(0, rows, rms_norm(x[rows], own, eps)[0])
        recompute = None
    return normed, recompute


class _Layer:
    """One layer; each of its two blocks returns an addition to the residual stream [T, hidden]."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        weights: LayerWeights,
        groups: Sequence[RowGroup],
        linear: BaseLinear,
    ) -> None:
        self._config, self._index, self._weights = config, index, weights
        self._groups, self._linear = groups, linear

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attention
    ) -> torch.Tensor:
        layer, groups, i = self._weights, self._groups, self._index
        h, recompute = self._norm("input_layernorm", layer.input_norm, x)
        out = self._attention(h, recompute, cos, sin, attend)
        x = x + mix.add_bottlenecks(out, x, h, (i, "attention_bottleneck"), groups)
        h, recompute = self._norm("post_attention_layernorm", layer.post_norm, x)
        out = self._mlp(h, recompute)
        return x + mix.add_bottlenecks(out, x, h, (i, "mlp_bottleneck"), groups)

    def _norm(
        self, name: str, weight: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, Recompute | None]:
        return _norm((self._index, name), weight, x, self._config.rms_norm_eps, self._groups)

    def _attention(
        self,
        x: torch.Tensor,
        recompute: Recompute | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attention,
    ) -> torch.Tensor:
        config, weights = self._config, self._weights
        qkv = self._project("qkv", x, recompute)  # [T, q_size + 2 * kv_size]
        in_place = torch.is_grad_enabled() and weights.q_norm is None
        if in_place:
            qkv = autograd.rotate_first_(qkv, config.num_heads + config.num_kv_heads, cos, sin)
        q, k, v = (  # [T, heads, head_dim], [T, kv_heads, head_dim] twice
            part.reshape(len(x), -1, config.head_dim)
            for part in torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        )
        if weights.q_norm is not None and weights.k_norm is not None:
            q, _ = self._norm("q_norm", weights.q_norm, q)
            k, _ = self._norm("k_norm", weights.k_norm, k)
        if not in_place:
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        return self._project("o", attend(self._index, q, k, v))

    def _mlp(self, x: torch.Tensor, recompute: Recompute | None) -> torch.Tensor:
        gate_up = self._project("gate_up", x, recompute)  # [T, 2 * intermediate]
        if torch.is_grad_enabled():
            return self._project("down", *autograd.silu_mul(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self._project("down", torch.nn.functional.silu(gate) * up)

    def _project(
        self, fused: str, x: torch.Tensor, recompute: Recompute | None = None
    ) -> torch.Tensor:
        matrix, bias = fused_matrix(self._weights, fused)

        def product(z: torch.Tensor) -> torch.Tensor:
            y = self._linear(matrix, z)
            return y if bias is None else y + bias.to(y.dtype)

        modules = list(zip(FUSED[fused], matrix.rows, strict=True))
        if self._groups and all(group.span is not None for group in self._groups):
            return spans.project(product, x, self._index, fused, modules, self._groups, recompute)
        return mix.project(product, x, self._index, fused, modules, self._groups)
