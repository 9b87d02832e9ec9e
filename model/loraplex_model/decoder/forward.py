"""The decoder as functions, shared by serving and training.

Rows are flat, [T, hidden]. Weights come from `BaseWeights`; the product with a base matrix, the
attention and the rows' adapters are arguments.

On the CPU activations are float32 whatever the compute dtype is: bfloat16 then is the type in which
norms, embeddings, KV and adapters are *stored*, and products are computed in float32. On CUDA
activations have the compute dtype and are rounded where Hugging Face rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from loraplex_model.adapters import mix, spans
from loraplex_model.adapters.merge import fused_matrix
from loraplex_model.adapters.mix import RowGroup
from loraplex_model.base.config import (
    MODEL,
    NO_ROPE,
    DecoderConfig,
    Gate,
    Norm,
    NormSpan,
    Rope,
    Site,
)
from loraplex_model.base.weights import BaseWeights, LayerWeights
from loraplex_model.decoder.attention import Attention
from loraplex_model.decoder.checkpointing import Checkpointed, unread
from loraplex_model.ops import autograd, nf4, rope
from loraplex_model.ops.autograd import Recompute
from loraplex_model.ops.linear import BaseLinear, ScratchLinear, by_tiles


def hidden_states(
    weights: BaseWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    groups: Sequence[RowGroup],
    linear: BaseLinear,
    attention: Attention,
    checkpointing: bool = False,
    is_long: torch.Tensor | None = None,
    products: torch.dtype | None = None,
) -> torch.Tensor:
    """The final, normed states [T, hidden] of `tokens` [T] at `positions` [T].

    `is_long` is bool [T]: whether a token is of a sequence that `config.long_rope` is for; None if
    none is. With `checkpointing` the backward pass computes the MLP of each layer again up to its
    last product (Chen et al., arXiv 1604.06174), with the same gradients bit for bit; what
    attention keeps is kept. `products` is the type of what matrix products read and give, and of
    the result; None is that of the residual stream, which does not change.
    """
    config = weights.config
    x = mix.embedded(tokens, weights.embed, activation_dtype(weights.embed), groups)
    if config.embed_scale != 1:
        scale = torch.tensor(config.embed_scale, dtype=x.dtype, device=x.device)
        scaled = x * scale
        if not config.scaled_prompts:
            scaled = torch.where((tokens < len(weights.embed))[:, None], scaled, x)
        x = scaled
    places = Places.of(config, positions, is_long, x.dtype)

    for i, layer in enumerate(weights.layers):
        x = _Layer(config, i, layer, groups, linear, products, checkpointing)(x, places, attention)
    norm = _Normed(config, groups)
    return norm((MODEL, "norm"), weights.norm, weights.norm_bias, x, products)[0]


@dataclass(frozen=True, slots=True)
class Places:
    """What the positions of T tokens mean for attention.

    Attributes:
        ropes: tables of cosines and sines, [T, 1, width / 2], by index in `config.ropes`.
        query_scale: factor on the queries, [T, 1, 1]; None for 1.
    """

    ropes: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    query_scale: torch.Tensor | None

    @staticmethod
    def of(
        config: DecoderConfig,
        positions: torch.Tensor,
        is_long: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> Places:
        """The tables for int positions [T], in `dtype`."""
        ropes = [_tables(each, positions) for each in config.ropes]
        if config.long_rope is not None and is_long is not None:
            long = _tables(config.long_rope, positions)
            chosen = [
                torch.where(is_long[:, None, None], theirs, ours)
                for ours, theirs in zip(ropes[0], long, strict=True)
            ]
            ropes[0] = chosen[0], chosen[1]
        scale = query_scale(config, positions)
        if scale is not None:
            scale = scale[:, None, None].to(dtype)
        return Places(tuple((cos.to(dtype), sin.to(dtype)) for cos, sin in ropes), scale)


def query_scale(config: DecoderConfig, positions: torch.Tensor) -> torch.Tensor | None:
    """Factors on the queries at int positions [T], float32 [T]; None if they are all 1."""
    if not config.query_scale:
        return None
    beta, period = config.query_scale
    return 1 + beta * torch.log1p(torch.floor(positions / period))


def _tables(each: Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # float32 even if everything else is float64, since the angles' rounding is part of the model
    inv_freq = torch.tensor(each.inv_freq, device=positions.device)
    return rope.tables(positions, inv_freq, each.scale)


def logits(
    weights: BaseWeights, hidden: torch.Tensor, groups: Sequence[RowGroup] = ()
) -> torch.Tensor:
    """Logits [R, vocab] of hidden states [R, hidden]; float32, or float64 if the states are.

    Row numbers in `groups` are indices into `hidden`.
    """
    base = autograd.wide(by_tiles(hidden, weights.lm_head.to(hidden.dtype)))
    result = mix.add_head(base, hidden, groups)
    config = weights.config
    if config.logit_scale != 1:
        result = result * config.logit_scale
    if config.logit_softcap:
        result = softcapped(result, config.logit_softcap)
    return result


def softcapped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(x / cap)`: values limited to the range from -cap to cap."""
    return torch.tanh(x / cap) * cap


def activation_dtype(stored: torch.Tensor) -> torch.dtype:
    """The type of activations for weights with the type and device of `stored`."""
    as_stored = stored.is_cuda or stored.dtype == torch.float64
    return stored.dtype if as_stored else torch.float32


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Recompute | None]:
    """`weight * x / rms(x)` over the last axis, computed in float32 at least.

    The result has the type `dtype` (None: that of x). Also returns how to recompute the result, if
    it is known. Differentiable in x and in the weight; with our own derivative if x alone needs a
    gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad:
        return autograd.rms_norm(x, weight, eps, dtype)
    dtype = dtype or x.dtype
    wide = autograd.wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(dtype) * normed.to(dtype), None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`weight * (x - mean) / deviation + bias` over the last axis, as `rms_norm` otherwise."""
    wide = autograd.wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    result = weight.to(wide.dtype) * normed
    if bias is not None:
        result = result + bias.to(wide.dtype)
    return result.to(dtype or x.dtype)


def apply_norm(
    config: DecoderConfig,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Recompute | None]:
    """One of the decoder's norms of x, whose last axis has the size of the weight or is a head.

    A weight of several heads is for the axis before the last, too. The result has the type `dtype`
    (None: that of x). Also returns how to recompute the result, if it is known.
    """
    if config.norm_offset:
        weight = autograd.wide(weight) + config.norm_offset
    if weight.shape[0] != x.shape[-1]:
        weight = weight.view(-1, x.shape[-1])  # a weight for every head
    if config.norm is Norm.RMS:
        return rms_norm(x, weight, config.rms_norm_eps, dtype)
    return layer_norm(x, weight, bias, config.rms_norm_eps, dtype), None


class _Normed:
    """The norms of one decoder, with the groups' changes of their weights."""

    def __init__(self, config: DecoderConfig, groups: Sequence[RowGroup]) -> None:
        self._config, self._groups = config, groups

    def __call__(
        self,
        site: Site,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, Recompute | None]:
        """The normed x, whose last axis has the size of the weight or is a head of it.

        It has the type `dtype` (None: that of x). Also returns how to recompute the result, if it
        is known.
        """
        normed, recompute = apply_norm(self._config, x, weight, bias, dtype)
        for rows, own, own_bias in mix.norm_weights(site, weight, bias, self._groups):
            changed, _ = apply_norm(self._config, x[rows], own, own_bias, dtype)
            normed = normed.index_copy(0, rows, changed)
            recompute = None
        return normed, recompute


_ACTIVATIONS: Mapping[Gate, Callable[[torch.Tensor], torch.Tensor]] = {
    Gate.SILU: torch.nn.functional.silu,
    Gate.GELU: torch.nn.functional.gelu,
    Gate.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class _Layer:
    """One layer; each of its two blocks returns an addition to the residual stream [T, hidden]."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        weights: LayerWeights,
        groups: Sequence[RowGroup],
        linear: BaseLinear,
        products: torch.dtype | None,
        checkpointing: bool,
    ) -> None:
        self._config, self._index, self._weights = config, index, weights
        self._groups, self._linear, self._products = groups, linear, products
        self._normed = _Normed(config, groups)
        self._checkpointed = Checkpointed(checkpointing)

    def __call__(self, x: torch.Tensor, places: Places, attend: Attention) -> torch.Tensor:
        h, recompute = self._norm("input_layernorm", x, self._products)
        attended = self._attention(h, recompute, places, attend)
        added = self._output("attention", attended, x, h)

        def beside(x: torch.Tensor, added: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return x + added + self._output("mlp", self._mlp(h, recompute), x, h)

        def after(x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
            x = x + added
            h, recompute = self._norm("post_attention_layernorm", x, self._products)
            return x + self._output("mlp", self._mlp(h, recompute), x, h)

        inputs = (x, added, h) if self._config.parallel else (x, added)
        return self._checkpointed(beside if self._config.parallel else after, *inputs)

    def _reads_mlp(self) -> bool:
        """Whether the derivative of the layer reads the values of the MLP's last product."""
        modules = self._config.fused["down"]
        adapted = spans.reads_output(self._index, modules, "mlp_bottleneck", self._groups)
        return adapted or self._weights.norms["mlp_output_norm"] is not None

    def _output(
        self, block: str, out: torch.Tensor, x: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor:
        """What a block with input h and output `out` adds to the residual stream x."""
        out, _ = self._norm(f"{block}_output_norm", out, x.dtype)
        scale = self._config.residual_scale
        site = self._index, f"{block}_bottleneck"
        out = mix.add_bottlenecks(out, x, h, site, self._groups, scale)
        return out if scale == 1 else out * scale

    def _norm(
        self, name: str, x: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, Recompute | None]:
        """The normed x, or x itself if the layer does not have the norm, in the type `dtype`."""
        weight = self._weights.norms[name]
        if weight is None:
            return x.to(dtype or x.dtype), None
        bias = self._weights.norm_biases.get(name)
        return self._normed((self._index, name), weight, bias, x, dtype)

    def _attention(
        self,
        x: torch.Tensor,
        recompute: Recompute | None,
        places: Places,
        attend: Attention,
    ) -> torch.Tensor:
        config = self._config
        qkv = self._project("qkv", x, recompute)  # [T, q_size + 2 * kv_size]
        rotary = config.layer_rope(self._index)
        cos, sin = places.ropes[max(rotary, 0)]
        in_place = (
            torch.is_grad_enabled()
            and rotary != NO_ROPE
            and not (config.qk_norm or config.rope_interleaved)
            and 2 * cos.shape[-1] == config.head_dim
        )
        if in_place:
            qkv = autograd.rotate_first_(qkv, config.num_heads + config.num_kv_heads, cos, sin)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q, k = self._head_norm("q_norm", q), self._head_norm("k_norm", k)
        v = v.reshape(len(x), -1, config.head_dim)  # [T, kv_heads, head_dim]
        if rotary != NO_ROPE and not in_place:
            q = rope.rotate(q, cos, sin, interleaved=config.rope_interleaved)
            k = rope.rotate(k, cos, sin, interleaved=config.rope_interleaved)
        if places.query_scale is not None:
            q = q * places.query_scale
        return self._project("o", attend(self._index, q.to(v.dtype), k.to(v.dtype), v))

    def _head_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [T, heads * head_dim], normed and as heads [T, heads, head_dim]."""
        config = self._config
        if config.qk_norm_span is NormSpan.ALL:
            x, _ = self._norm(name, x.contiguous())
        x = x.reshape(len(x), -1, config.head_dim)
        return x if config.qk_norm_span is NormSpan.ALL else self._norm(name, x)[0]

    def _experts(self, x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """The weighted outputs of each row's experts, added in the order of the experts."""
        config = self._config
        scores = autograd.wide(by_tiles(x, router.to(x.dtype))).softmax(-1)  # [T, experts]
        shares, chosen = scores.topk(config.experts_per_token, dim=-1)
        if config.normalised_experts:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(x.dtype)
        result = torch.zeros_like(x)
        activation = _ACTIVATIONS[config.activation]
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == expert)
            gate, up = self._expert_product("gate_up", expert, x[rows], rows).chunk(2, dim=-1)
            out = self._expert_product("down", expert, activation(gate) * up, rows)
            result = result.index_add(0, rows, out * shares[rows, place, None])
        return result

    def _expert_product(
        self, fused: str, expert: int, x: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """One expert's part of a fused matrix with `rows` of the pass, and their adapters."""
        config = self._config
        parts = nf4.split(fused_matrix(self._weights, fused)[0])
        names = config.fused[fused]
        y = self._linear(nf4.stack(parts[expert * len(names) : (expert + 1) * len(names)]), x)
        number = expert, config.num_experts
        for name, part in zip(names, y.chunk(len(names), dim=-1), strict=True):
            mix.add_to_expert(part, x, rows, (self._index, name), number, self._groups)
        return y

    def _mlp(self, x: torch.Tensor, recompute: Recompute | None) -> torch.Tensor:
        config = self._config
        if self._weights.router is not None:
            return self._experts(x, self._weights.router)
        gate_up = self._project("gate_up", x, recompute)  # [T, 2 * intermediate], or only up
        if config.gated and config.activation is Gate.SILU and torch.is_grad_enabled():
            return self._project("down", *autograd.silu_mul(gate_up))
        activation = _ACTIVATIONS[config.activation]
        if not config.gated:
            return self._project("down", activation(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self._project("down", activation(gate) * up)

    def _project(
        self, fused: str, x: torch.Tensor, recompute: Recompute | None = None
    ) -> torch.Tensor:
        matrix, bias = fused_matrix(self._weights, fused)

        def product(z: torch.Tensor) -> torch.Tensor:
            y = self._linear(matrix, z)
            return y if bias is None else y + bias.to(y.dtype)

        shapes = self._config.projection_shapes()
        modules = [(name, shapes[name][1]) for name in self._config.fused[fused]]
        if self._groups and all(group.span is not None for group in self._groups):
            linear, back = self._linear, None
            if isinstance(linear, ScratchLinear) and linear.in_kernels(matrix, x):
                back = partial(linear.back, matrix)
            if fused == "down" and self._checkpointed.recomputes and not self._reads_mlp():
                product = partial(unread, matrix.shape[0])
            return spans.project(
                product, x, self._index, fused, modules, self._groups, recompute, back
            )
        return mix.project(product, x, self._index, fused, modules, self._groups)
