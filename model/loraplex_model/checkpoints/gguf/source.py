"""GGUF files as a source of Hugging Face tensors.

The file has its own configuration, with llama.cpp's key names, and quantised tensors, with
llama.cpp's tensor names. For the "llama" architecture (Llama and Mistral) the rows of q and k are
stored interleaved in pairs within each head; this module restores Hugging Face's two halves. The
`gguf` package dequantises values to float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraplex_model.base import families
from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.checkpoints.gguf import keys, kinds, names, parts
from loraplex_model.checkpoints.gguf.header import GgufFile, GgufTensor
from loraplex_model.checkpoints.gguf.settings import GgufSettings

_FAMILIES = {family.gguf: family for family in reversed(list(families.FAMILIES.values()))}
"""The first family of each GGUF architecture: Mistral's files are read as Llama's."""

_END_TOKENS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id")


class GgufSource:
    """A `TensorSource` over one GGUF file, or over all parts of a split one.

    Nothing of the file is left out: a tensor or a setting that the decoder would not use is
    refused by its name (`Refusal`, MODEL_UNSUPPORTED).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata, files = parts.read_parts(path)
        self._tensors: dict[str, tuple[GgufFile, GgufTensor]] = {
            name: (file, tensor) for file in files for name, tensor in file.tensors.items()
        }
        kinds.refuse_others(path, self._metadata, self._tensors, _FAMILIES)
        architecture = str(self._metadata["general.architecture"])
        self._family = _FAMILIES[architecture]
        config = keys.config_of(GgufSettings(path, architecture, self._metadata))
        self._names, self._zeros = self._assign(architecture, config["num_hidden_layers"])
        self.config: Mapping[str, Any] = config | self._ends_and_shape()
        self.generation_config: Mapping[str, Any] = {"eos_token_id": self._end_tokens()}
        self.has_tokenizer = "tokenizer.ggml.model" in self._metadata
        self.rope_divisors: tuple[float, ...] = ()
        if names.ROPE_FACTORS in self._tensors:
            self.rope_divisors = self._rope_divisors()

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._names.keys() | self._zeros

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource`: float32, in Hugging Face's layout."""
        if name in self._zeros:
            weight = self._tensors[self._names[name.removesuffix("bias") + "weight"]][1]
            return torch.zeros(weight.shape[:1])
        if name not in self._names:
            raise model_invalid(f"{self._path} has no tensor for {name}")
        values = self._dequantise(self._names[name])
        heads = {
            ".q_proj.": self.config["num_attention_heads"],
            ".k_proj.": self.config["num_key_value_heads"],
        }
        if self._family.gguf_interleaved:
            for part, count in heads.items():
                if part in name:
                    values = self._halves(name, values, count)
        return values

    def _assign(self, architecture: str, layers: int) -> tuple[Mapping[str, str], frozenset[str]]:
        if layers > len(self._tensors):
            raise model_invalid(
                f"{self._path} states {layers} layers, but it holds {len(self._tensors)} tensors"
            )
        return names.assign(self._path, self._tensors.keys(), architecture, self._family, layers)

    def _dequantise(self, gguf_name: str) -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        file, tensor = self._tensors[gguf_name]
        kind = GGMLQuantizationType(tensor.kind)
        raw = np.frombuffer(file.data, np.uint8, tensor.size, tensor.start)
        try:
            values = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        except (NotImplementedError, ValueError) as error:
            raise model_unsupported(f"{file.path}: {gguf_name}: {error}") from error
        # float32 tensors are views of the read-only file and torch needs writable memory
        writable = np.require(values, np.float32, ["C", "W"])
        return torch.from_numpy(writable).reshape(tensor.shape)

    def _halves(self, name: str, rows: torch.Tensor, heads: int) -> torch.Tensor:
        if rows.ndim == 0 or rows.shape[0] % (2 * heads):
            raise model_invalid(
                f"{self._path}: {self._names[name]} has shape {list(rows.shape)}, which is not a "
                f"whole number of pairs for each of {heads} heads"
            )
        return halves(rows, heads)

    def _rope_divisors(self) -> tuple[float, ...]:
        if self.config["rope_parameters"]["rope_type"] != "default":
            raise model_unsupported(
                f"{self._path} scales the rotary frequencies twice, by {names.ROPE_FACTORS} and by "
                "rope.scaling"
            )
        divisors = self._dequantise(names.ROPE_FACTORS)
        width = self.config["head_dim"]
        if divisors.shape != (width // 2,) or not bool((divisors > 0).all()):
            raise model_invalid(
                f"{self._path}: {names.ROPE_FACTORS} must hold {width // 2} numbers above 0"
            )
        return tuple(divisors.tolist())

    def _end_tokens(self) -> list[Any]:
        """Ends of text, turn and message, at each of which llama.cpp ends a generation."""
        found: list[Any] = []
        for key in _END_TOKENS:
            value = self._metadata.get(f"tokenizer.ggml.{key}")
            found += value if isinstance(value, list) else [value]
        return found

    def _ends_and_shape(self) -> dict[str, Any]:
        embeddings = self._tensors[names.EMBED][1].shape
        if len(embeddings) != 2:
            raise model_invalid(f"{self._path}: {names.EMBED} has shape {list(embeddings)}")
        return {
            "model_type": self._family.model_type,
            "vocab_size": embeddings[0],
            "tie_word_embeddings": families.LM_HEAD not in self._names,
            "attention_bias": any(name.endswith(".bias") for name in self._names),
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._metadata.get("tokenizer.ggml.padding_token_id"),
        }


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of q and k rows: (pair, 2) within a head becomes (2, pair)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
