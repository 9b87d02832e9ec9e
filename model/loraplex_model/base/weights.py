"""The base model's weights: fused NF4 matrices, and the few tensors that stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.quantisation import BLOCK as BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class NF4Matrix:
    """Several modules' matrices stacked into one [out, in], NF4 with double quantisation.

    Modules are those of the checkpoint (`DecoderConfig.modules_of`).

    Each module was quantised on its own, so its bytes equal those of bitsandbytes' `Linear4bit`.
    These tensors are never written to after they are made. Two matrices are equal only if they are
    the same object, so that values derived from one can be looked up by it.

    Attributes:
        shape: (out, in) of the whole stack.
        packed: uint8 [out * in / 2], two codes per byte, the first in the high half.
        absmax: the blocks' maxima, module after module, ceil(rows * in / 64) for each (out * in /
            64 in all if in is a multiple of 64): uint8 with double quantisation, else the float32
            maxima themselves. `nf4.absmax_float` reads both.
        absmax_scales: for each module float32 [ceil(blocks / 256)]; () for float32 maxima.
        absmax_offsets: for each module the mean that was subtracted; () for float32 maxima.
        rows: number of output rows of each module.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scales: tuple[torch.Tensor, ...]
    absmax_offsets: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer. Vectors have the compute dtype; biases and norms may be absent.

    Attributes:
        norm_biases: biases of norms, by the name of their site.
        router: [num_experts, hidden], or None if there is one MLP.
    """

    input_norm: torch.Tensor | None
    qkv: NF4Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: NF4Matrix
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor | None
    gate_up: NF4Matrix
    down: NF4Matrix
    attention_output_norm: torch.Tensor | None = None
    mlp_output_norm: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    norm_biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    router: torch.Tensor | None = None

    @property
    def norms(self) -> Mapping[str, torch.Tensor | None]:
        """Norm weights by the name of their site; None for those that the family lacks."""
        return {
            "input_layernorm": self.input_norm,
            "post_attention_layernorm": self.post_norm,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
            "attention_output_norm": self.attention_output_norm,
            "mlp_output_norm": self.mlp_output_norm,
        }

    @property
    def biases(self) -> Mapping[str, torch.Tensor | None]:
        """Biases by the name of their fused matrix."""
        return {
            "qkv": self.qkv_bias,
            "o": self.o_bias,
            "gate_up": self.gate_up_bias,
            "down": self.down_bias,
        }


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """Weights of a whole base model.

    Attributes:
        embed: [vocab, hidden], compute dtype.
        lm_head: [vocab, hidden]; the same tensor as `embed` if they are tied.
        fingerprint: "sha256:<hex>" over the configuration, the NF4 codes and the dense tensors as
            stored; equal for every compute dtype, and on every machine.
        file: path of the stored weights; "" if they were not read from a file.
        norm_bias: bias of the last norm, or None.
    """

    config: DecoderConfig
    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    file: str = ""
    norm_bias: torch.Tensor | None = None

    @property
    def info(self) -> BaseInfo:
        """Description of this base without its tensors."""
        dtype = str(self.embed.dtype).removeprefix("torch.")
        return BaseInfo(self.config, self.fingerprint, dtype, weights_file=self.file)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, a tied head counted once."""
        tensors = [self.embed, self.norm]
        if self.lm_head is not self.embed:
            tensors.append(self.lm_head)
        if self.norm_bias is not None:
            tensors.append(self.norm_bias)
        for layer in self.layers:
            dense = (
                *layer.norms.values(),
                *layer.biases.values(),
                *layer.norm_biases.values(),
                layer.router,
            )
            tensors += [tensor for tensor in dense if tensor is not None]
            for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
                tensors += [matrix.packed, matrix.absmax, *matrix.absmax_scales]
        return sum(tensor.nbytes for tensor in tensors)
