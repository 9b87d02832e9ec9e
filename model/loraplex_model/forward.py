"""The decoder as functions: what serving and training both compute.

Rows are flat, [T, hidden]. Weights come from `BaseWeights`; how a base matrix multiplies, where
attention finds the past and which rows carry which adapters are arguments.

On the CPU activations are float32 whatever the compute dtype is: bfloat16 then says how norms,
embeddings, KV and adapters are *stored*, and every product is exact in what is stored. On CUDA
activations are of the compute dtype and round where Hugging Face's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from loraplex_model import rope
from loraplex_model.attention import Attention, PackedAttention
from loraplex_model.config import DecoderConfig
from loraplex_model.linear import BaseLinear, DequantisedLinear, by_tiles
from loraplex_model.lora import RowGroup, add_deltas
from loraplex_model.stored import FUSED
from loraplex_model.weights import BaseWeights, LayerWeights, NF4Matrix


def hidden_states(
    weights: BaseWeights,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    groups: Sequence[RowGroup],
    linear: BaseLinear,
    attention: Attention,
) -> torch.Tensor:
    """The final, normed states [T, hidden] of `tokens` [T] at `positions` [T]."""
    config = weights.config
    inv_freq = torch.tensor(config.rope_inv_freq, device=tokens.device)
    cos, sin = rope.tables(positions, inv_freq, config.rope_scale)
    x = weights.embed[tokens.long()]
    x = x.to(activation_dtype(x))
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)

    for i, layer in enumerate(weights.layers):
        block = _Layer(config, i, layer, groups, linear)
        h = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        x = x + block.attention(h, cos, sin, attention)
        h = rms_norm(x, layer.post_norm, config.rms_norm_eps)
        x = x + block.mlp(h)
    return rms_norm(x, weights.norm, config.rms_norm_eps)


def logits(weights: BaseWeights, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [R, vocab] of states [R, hidden]."""
    return by_tiles(hidden, weights.lm_head.to(hidden.dtype)).float()


def packed_logits(
    weights: BaseWeights,
    tokens: torch.Tensor,
    starts: Sequence[int],
    groups: Sequence[RowGroup],
    linear: BaseLinear | None = None,
) -> torch.Tensor:
    """float32 [T, vocab] of whole sequences laid side by side; differentiable in the adapters.

    Sequence s owns `tokens[starts[s]:starts[s + 1]]`. Groups made with `lora.trainable` receive
    gradients; the base is a constant.
    """
    bounds = list(starts)
    lengths = [end - start for start, end in pairwise(bounds)]
    positions = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
    attention = PackedAttention(weights.config, bounds)
    hidden = hidden_states(
        weights, tokens, positions, groups, linear or DequantisedLinear(), attention
    )
    return logits(weights, hidden)


def activation_dtype(stored: torch.Tensor) -> torch.dtype:
    """The type of activations where weights are stored like `stored`."""
    return stored.dtype if stored.is_cuda else torch.float32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / rms(x)` over the last axis, normed in float32, in the type of x."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


class _Layer:
    """One layer's two halves; both return what is added to the residual stream."""

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

    def attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attention
    ) -> torch.Tensor:
        config, weights = self._config, self._weights
        qkv = self._project("qkv", weights.qkv, x, weights.qkv_bias)
        q, k, v = (
            part.reshape(len(x), -1, config.head_dim)
            for part in torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        )
        if weights.q_norm is not None and weights.k_norm is not None:
            q = rms_norm(q, weights.q_norm, config.rms_norm_eps)
            k = rms_norm(k, weights.k_norm, config.rms_norm_eps)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        return self._project("o", weights.o, attend(self._index, q, k, v), weights.o_bias)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._project("gate_up", self._weights.gate_up, x).chunk(2, dim=-1)
        return self._project("down", self._weights.down, torch.nn.functional.silu(gate) * up)

    def _project(
        self, name: str, matrix: NF4Matrix, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = self._linear(matrix, x)
        if bias is not None:
            y = y + bias.to(y.dtype)
        add_deltas(y, x, self._index, zip(FUSED[name], matrix.rows, strict=True), self._groups)
        return y
