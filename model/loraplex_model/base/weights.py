"""The base model's weights: NF4 matrices, fused, beside the few tensors that stay dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.info import BaseInfo

BLOCK = 64
"""Weights that share one absmax (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True, slots=True)
class NF4Matrix:
    """Several modules' matrices stacked into one [out, in], NF4 with double quantisation.

    Each module was quantised on its own, so its bytes equal those of bitsandbytes' `Linear4bit`.
    Nothing writes to these tensors after they are made.

    Attributes:
        shape: (out, in) of the whole stack.
        packed: uint8 [out * in / 2], two codes a byte, the first in the high half.
        absmax: the blocks' maxima, module after module, ceil(rows * in / 64) for each (out * in /
            64 in all where in is a multiple of 64): uint8, quantised once more; or float32, the
            maxima themselves, for a checkpoint that was quantised only once. `nf4.absmax_float`
            reads both.
        absmax_scales: one float32 [ceil(blocks / 256)] per module; () for float32 maxima.
        absmax_offsets: the mean that was subtracted, per module; () for float32 maxima.
        rows: each module's number of output rows.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scales: tuple[torch.Tensor, ...]
    absmax_offsets: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Vectors are of the compute dtype; biases and head norms may be absent."""

    input_norm: torch.Tensor
    qkv: NF4Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: NF4Matrix
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: NF4Matrix
    down: NF4Matrix


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """A whole base model.

    Attributes:
        embed: [vocab, hidden], compute dtype.
        lm_head: [vocab, hidden]; the same tensor as `embed` when tied.
        fingerprint: "sha256:<hex>" over the configuration, the NF4 codes and the dense tensors as
            stored; the same for every compute dtype, and on every machine.
    """

    config: DecoderConfig
    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor
    fingerprint: str
    eos_token_ids: tuple[int, ...]

    @property
    def info(self) -> BaseInfo:
        """Description of this base without its tensors."""
        dtype = str(self.embed.dtype).removeprefix("torch.")
        return BaseInfo(self.config, self.fingerprint, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, a tied head counted once."""
        tensors = [self.embed, self.norm]
        if self.lm_head is not self.embed:
            tensors.append(self.lm_head)
        for layer in self.layers:
            dense = (layer.input_norm, layer.post_norm, layer.qkv_bias, layer.o_bias)
            tensors += [t for t in (*dense, layer.q_norm, layer.k_norm) if t is not None]
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
                tensors += [matrix.packed, matrix.absmax, *matrix.absmax_scales]
        return sum(tensor.nbytes for tensor in tensors)
