"""The quantised model as one safetensors file, written as a stream and read by mapping it.

Writing needs the memory of one tensor, and reading uses page cache that all processes share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex_model.base.config import FUSED, LAYER_NORMS, DecoderConfig
from loraplex_model.base.refusal import model_invalid
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.ops.dtypes import SAFETENSORS_NAMES
from loraplex_model.ops.nf4 import NESTED_BLOCK, blocks_of

WEIGHTS = "model.safetensors"

_NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}


def stored_norm(site: str) -> str:
    """Name of a norm's weight in the file, and in `LayerWeights`, by the name of its site."""
    return _NORMS.get(site, site)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredModel:
    """Description of a stored model: everything but its tensors."""

    config: DecoderConfig
    fingerprint: str
    eos_token_ids: tuple[int, ...]


class StoredWriter:
    """Writes tensors to a new file and computes the model's fingerprint.

    `fingerprint` covers the configuration, and names, types, shapes and bytes of dense tensors and
    codes. It leaves out the quantised maxima, since their last bits depend on the vector width of
    the machine.
    """

    def __init__(self, file: SafetensorsFile, config: DecoderConfig) -> None:
        self._file = file
        self._digest = hashlib.sha256(json.dumps(config.identity()).encode())

    @property
    def fingerprint(self) -> str:
        """Digest of the configuration and of the tensors added so far."""
        return "sha256:" + self._digest.hexdigest()

    def add(self, name: str, tensor: torch.Tensor, *, identifies: bool = True) -> None:
        """Appends a tensor, which the fingerprint covers if `identifies`."""
        tensor = tensor.detach().contiguous()
        if identifies:
            self._digest.update(
                f"{name} {SAFETENSORS_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode()
            )
            self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._file.add(name, tensor)

    def add_matrix(self, name: str, matrix: NF4Matrix) -> None:
        """Appends the tensors of an NF4 matrix."""
        self.add(f"{name}.packed", matrix.packed)
        self.add(f"{name}.absmax", matrix.absmax, identifies=False)
        if matrix.absmax_scales:
            self.add(f"{name}.scales", torch.cat(matrix.absmax_scales), identifies=False)
            self.add(f"{name}.offsets", torch.tensor(matrix.absmax_offsets), identifies=False)


def read_weights(
    path: Path, model: StoredModel, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> BaseWeights:
    """Maps the file. On the CPU packed codes stay in it; dense tensors are converted to `dtype`.

    Raises `Refusal` (MODEL_INVALID) if the file cannot be read or lacks a tensor.
    """
    config = model.config
    try:
        with safe_open(path, framework="pt") as file:
            reader = _StoredReader(file, config, dtype, device)
            embed = reader.dense("embed")
            return BaseWeights(
                config=config,
                embed=embed,
                layers=tuple(reader.layer(i) for i in range(config.num_layers)),
                norm=reader.dense("norm"),
                lm_head=embed if config.tie_embeddings else reader.dense("lm_head"),
                fingerprint=model.fingerprint,
                eos_token_ids=model.eos_token_ids,
                file=str(path.absolute()),
                norm_bias=reader.optional("norm_bias"),
            )
    except (SafetensorError, OSError) as error:
        raise model_invalid(f"{path} is damaged: {error}; delete it") from error


class _StoredReader:
    """Reads the tensors of the file by their place in the decoder."""

    def __init__(
        self, file: Any, config: DecoderConfig, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._file, self._names = file, frozenset(file.keys())
        self._config, self._dtype, self._device = config, dtype, device

    def dense(self, name: str) -> torch.Tensor:
        return self._tensor(name).to(self._device, self._dtype)

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def optional(self, name: str) -> torch.Tensor | None:
        return self.dense(name) if name in self._names else None

    def layer(self, i: int) -> LayerWeights:
        at, config = f"layers.{i}.", self._config
        norms = {site: at + stored_norm(site) for site in config.norm_widths()}
        biases = {site: self.optional(f"{name}_bias") for site, name in norms.items()}
        parts: dict[str, Any] = {stored_norm(site): self._norm(norms, site) for site in LAYER_NORMS}
        for fused in FUSED:
            parts[fused] = self._matrix(at, fused)
            parts[f"{fused}_bias"] = self.optional(f"{at}{fused}_bias")
        return LayerWeights(
            **parts,
            norm_biases={site: bias for site, bias in biases.items() if bias is not None},
            router=self.optional(at + "router"),
        )

    def _norm(self, norms: Mapping[str, str], site: str) -> torch.Tensor | None:
        return self.dense(norms[site]) if site in norms else None

    def _matrix(self, at: str, name: str) -> NF4Matrix:
        shapes, modules = self._config.module_shapes(), self._config.modules_of(name)
        rows = tuple(shapes[module][1] for module in modules) * self._config.copies_of(name)
        fan_in = shapes[modules[0]][0]
        at += name
        scales: tuple[torch.Tensor, ...] = ()
        offsets: tuple[float, ...] = ()
        if f"{at}.scales" in self._names:
            counts = [-(-blocks_of(count, fan_in) // NESTED_BLOCK) for count in rows]
            scales = torch.split(self._tensor(f"{at}.scales").to(self._device), counts)
            offsets = tuple(self._tensor(f"{at}.offsets").tolist())
        return NF4Matrix(
            (sum(rows), fan_in),
            self._tensor(f"{at}.packed").to(self._device),
            self._tensor(f"{at}.absmax").to(self._device),
            scales,
            offsets,
            rows,
        )
