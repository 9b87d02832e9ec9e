"""The tensors of a stored model, in order, and the checkpoint's tensors that each is made of."""

from __future__ import annotations

from typing import Protocol

import torch

from loraplex_model.base import families
from loraplex_model.base.config import DecoderConfig, NormSpan
from loraplex_model.base.families import tensor_name
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.checkpoints.stored import stored_norm
from loraplex_model.ops.nf4 import stack

PER_LAYER = 40
"""An upper bound on the tensors of a stored layer."""
OTHERS = 4
"""An upper bound on the stored tensors outside of layers."""


class PartReader(Protocol):
    """Reads tensors of a checkpoint by their Hugging Face names, or only their types and shapes."""

    def dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of floats. Raises `Refusal` if it is missing, or of another type or shape."""

    def matrix(self, name: str, shape: tuple[int, int]) -> NF4Matrix:
        """One module's matrix (out, in) in NF4. Raises `Refusal` as `dense`."""


class PartWriter(Protocol):
    """Takes the tensors of a stored model, or only counts them."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a dense tensor."""

    def add_matrix(self, name: str, matrix: NF4Matrix) -> None:
        """Appends a matrix in NF4."""


def write_parts(config: DecoderConfig, reader: PartReader, writer: PartWriter) -> None:
    """Reads every tensor of a decoder and writes what is stored of it, one after the other."""
    hidden = (config.hidden_size,)
    writer.add("embed", reader.dense(families.EMBED, (config.vocab_size, *hidden)))
    for i in range(config.num_layers):
        _Layer(config, reader, i).write(writer)
    writer.add("norm", reader.dense(families.NORM, hidden))
    if config.norm_bias:
        writer.add("norm_bias", reader.dense(families.NORM_BIAS, hidden))
    if not config.tie_embeddings:
        writer.add("lm_head", reader.dense(families.LM_HEAD, (config.vocab_size, *hidden)))


class _Layer:
    """The tensors of one layer."""

    def __init__(self, config: DecoderConfig, reader: PartReader, layer: int) -> None:
        self._config, self._reader, self._layer = config, reader, layer
        self._shapes = config.module_shapes()

    def write(self, writer: PartWriter) -> None:
        config, at = self._config, f"layers.{self._layer}."
        for site, width in config.norm_widths().items():
            name = at + stored_norm(site)
            writer.add(name, self._norm(site, width))
            if config.norm_bias and site not in ("q_norm", "k_norm"):
                writer.add(f"{name}_bias", self._norm(site, width, "bias"))
        for fused in config.fused:
            modules = config.modules_of(fused)
            if config.biased.issuperset(modules):
                bias = torch.cat([self._bias(module) for module in modules])
                writer.add(f"{at}{fused}_bias", bias)
        if config.num_experts:
            writer.add(at + "router", self._router())
        for fused in config.fused:
            parts = [
                self._matrix(module, expert)
                for expert in range(config.copies_of(fused))
                for module in config.modules_of(fused)
            ]
            writer.add_matrix(at + fused, stack(parts))

    def _name(self, module: str, kind: str = "weight") -> str:
        return tensor_name(self._config.architecture, self._layer, module, kind)

    def _norm(self, site: str, width: int, kind: str = "weight") -> torch.Tensor:
        """A norm's weight or bias, flat: heads that have one each are put side by side."""
        name, head_dim = self._name(site, kind), self._config.head_dim
        if "{head}" in name:
            names = [name.format(head=head) for head in range(width // head_dim)]
            return torch.cat([self._reader.dense(each, (head_dim,)) for each in names])
        if site in ("q_norm", "k_norm") and self._config.qk_norm_span is NormSpan.EACH:
            return self._reader.dense(name, (width // head_dim, head_dim)).reshape(-1)
        return self._reader.dense(name, (width,))

    def _bias(self, module: str) -> torch.Tensor:
        return self._reader.dense(self._name(module, "bias"), (self._shapes[module][1],))

    def _router(self) -> torch.Tensor:
        shape = self._config.num_experts, self._config.hidden_size
        return self._reader.dense(self._name("router"), shape)

    def _matrix(self, module: str, expert: int) -> NF4Matrix:
        """A module's weights; `expert` says whose, if it has experts."""
        fan_in, rows = self._shapes[module]
        return self._reader.matrix(self._name(module).format(expert=expert), (rows, fan_in))
