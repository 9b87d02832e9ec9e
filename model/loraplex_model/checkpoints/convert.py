"""Converting a checkpoint to the stored form, tensor by tensor, each module quantised on its own.

Modules in bitsandbytes NF4 are used unchanged; others are quantised from their stored values.
Norms, biases, embeddings and the head stay as stored.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from loraplex_model.base import families
from loraplex_model.base.config import DecoderConfig, NormSpan
from loraplex_model.base.families import tensor_name
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import model_invalid
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.checkpoints import prequantised
from loraplex_model.checkpoints.checkpoint import TensorSource
from loraplex_model.checkpoints.control.ends import named_end_tokens
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.checkpoints.stored import StoredModel, StoredWriter, stored_norm
from loraplex_model.ops.nf4 import quantise, stack

_PER_LAYER = 40  # an upper bound on the tensors of a stored layer


def convert(source: TensorSource, path: Path) -> StoredModel:
    """Writes the quantised model to `path`, with one dense matrix in memory at a time.

    Raises `Refusal`: MODEL_UNSUPPORTED, MODEL_INVALID (a tensor is missing or has a wrong shape).
    """
    prequantised.refuse_unsupported(source.config)
    config = decoder_config(source.config)
    if source.rope_divisors:
        pairs = zip(config.rope_inv_freq, source.rope_divisors, strict=True)
        config = dataclasses.replace(config, rope_inv_freq=tuple(f / by for f, by in pairs))
    reader = _SourceReader(source, config)
    with SafetensorsFile(path, 4 + _PER_LAYER * config.num_layers) as file:
        writer = StoredWriter(file, config)
        writer.add("embed", reader.dense(families.EMBED, config.vocab_size, config.hidden_size))
        for i in range(config.num_layers):
            _layer(reader, writer, config, i)
        writer.add("norm", reader.dense(families.NORM, config.hidden_size))
        if config.norm_bias:
            writer.add("norm_bias", reader.dense(families.NORM_BIAS, config.hidden_size))
        if not config.tie_embeddings:
            head = reader.dense(families.LM_HEAD, config.vocab_size, config.hidden_size)
            writer.add("lm_head", head)
    return StoredModel(config, writer.fingerprint, named_ends(source, config.vocab_size))


def _layer(reader: _SourceReader, writer: StoredWriter, config: DecoderConfig, i: int) -> None:
    at = f"layers.{i}."
    for site, width in config.norm_widths().items():
        name = at + stored_norm(site)
        writer.add(name, reader.norm(i, site, width))
        if config.norm_bias and site not in ("q_norm", "k_norm"):
            writer.add(f"{name}_bias", reader.norm(i, site, width, "bias"))
    for fused in config.fused:
        modules = config.modules_of(fused)
        if config.biased.issuperset(modules):
            bias = torch.cat([reader.bias(i, module) for module in modules])
            writer.add(f"{at}{fused}_bias", bias)
    if config.num_experts:
        writer.add(at + "router", reader.router(i))
    for fused in config.fused:
        parts = [
            reader.matrix(i, module, expert)
            for expert in range(config.copies_of(fused))
            for module in config.modules_of(fused)
        ]
        writer.add_matrix(at + fused, stack(parts))


class _SourceReader:
    """Reads tensors of the source and checks their shapes."""

    def __init__(self, source: TensorSource, config: DecoderConfig) -> None:
        self._source, self._config = source, config
        self._shapes = config.module_shapes()

    def dense(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._source.read(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise model_invalid(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, "
                f"but the configuration needs {list(shape)}"
            )
        return tensor if tensor.dtype.itemsize <= 4 else tensor.float()

    def norm(self, layer: int, site: str, width: int, kind: str = "weight") -> torch.Tensor:
        """A norm's weight or bias, flat: heads that have one each are put side by side."""
        name = tensor_name(self._config.architecture, layer, site, kind)
        head_dim = self._config.head_dim
        if "{head}" in name:
            heads = range(width // head_dim)
            return torch.cat([self.dense(name.format(head=head), head_dim) for head in heads])
        if site in ("q_norm", "k_norm") and self._config.qk_norm_span is NormSpan.EACH:
            return self.dense(name, width // head_dim, head_dim).reshape(-1)
        return self.dense(name, width)

    def bias(self, layer: int, module: str) -> torch.Tensor:
        name = tensor_name(self._config.architecture, layer, module, "bias")
        return self.dense(name, self._shapes[module][1])

    def router(self, layer: int) -> torch.Tensor:
        name = tensor_name(self._config.architecture, layer, "router")
        return self.dense(name, self._config.num_experts, self._config.hidden_size)

    def matrix(self, layer: int, module: str, expert: int) -> NF4Matrix:
        """A module's weights; `expert` says whose, if it has experts."""
        name = tensor_name(self._config.architecture, layer, module).format(expert=expert)
        fan_in, rows = self._shapes[module]
        if prequantised.is_nf4(self._source, name):
            return prequantised.read(self._source, name, (rows, fan_in))
        return quantise(self.dense(name, rows, fan_in))


def named_ends(source: TensorSource, vocab_size: int) -> tuple[int, ...]:
    """The end tokens that the configurations of a checkpoint name, in the order of the files."""
    ids = named_end_tokens("configuration", source.config, vocab_size)
    ids += named_end_tokens("generation configuration", source.generation_config, vocab_size)
    return tuple(dict.fromkeys(ids))
