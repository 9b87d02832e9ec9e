"""GGUF files as a source of Hugging Face tensors.

The file has its own configuration, with llama.cpp's key names, and quantised tensors, with
llama.cpp's tensor names. For the "llama" architecture (Llama and Mistral) the rows of q and k are
stored interleaved in pairs within each head; this module restores Hugging Face's two halves. The
`gguf` package dequantises values to float32.

The header is parsed here because the package's own reader takes more than ten seconds for a large
vocabulary. Every length in it is checked against the file's size before it is used.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraplex_model.base import families
from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported
from loraplex_model.checkpoints.checkpoint import TensorInfo

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""`struct` letters of the metadata types of fixed size."""

_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4

_FAMILIES = {family.gguf: family for family in reversed(list(families.FAMILIES.values()))}
"""The first family of each GGUF architecture: Mistral's files are read as Llama's."""

_CONFIG = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

_END_TOKENS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id")

MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""llama.cpp's names of a layer's modules."""

_BY_GGUF = {gguf: module for module, gguf in MODULES.items()}
_GLOBALS = {
    "token_embd.weight": families.EMBED,
    "output_norm.weight": families.NORM,
    "output.weight": families.LM_HEAD,
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies (Llama 3's scaling), float32 [head_dim / 2]."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Place of a tensor: shape as in torch, ggml type, first byte in the file, size in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class GgufSource:
    """A `TensorSource` over one GGUF file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise model_invalid(f"{path} is empty") from error
        self._metadata, self._tensors = _HeaderReader(self._bytes, path).header()
        self._architecture = str(self._metadata.get("general.architecture"))
        self._names = dict(_hf_names(self._tensors))
        self.config: Mapping[str, Any] = self._config()
        self.generation_config: Mapping[str, Any] = {"eos_token_id": self._end_tokens()}
        self.has_tokenizer = "tokenizer.ggml.model" in self._metadata
        self.rope_divisors: tuple[float, ...] = ()
        if ROPE_FACTORS in self._tensors:
            self.rope_divisors = tuple(self._dequantise(ROPE_FACTORS).tolist())

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._names.keys()

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        if name not in self._names:
            raise model_invalid(f"{self._path} has no tensor for {name}")
        tensor = self._tensors[self._names[name]]
        return TensorInfo(tensor.shape, "F32", tensor.size)

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource`: float32, in Hugging Face's layout."""
        if name not in self._names:
            raise model_invalid(f"{self._path} has no tensor for {name}")
        values = self._dequantise(self._names[name])
        heads = {
            ".q_proj.": self.config["num_attention_heads"],
            ".k_proj.": self.config["num_key_value_heads"],
        }
        if _FAMILIES[self._architecture].gguf_interleaved:
            for part, count in heads.items():
                if part in name:
                    values = _halves(values, count)
        return values

    def _dequantise(self, gguf_name: str) -> torch.Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self._tensors[gguf_name]
        kind = GGMLQuantizationType(tensor.kind)
        raw = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.start)
        try:
            values = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        except (NotImplementedError, ValueError) as error:
            raise model_unsupported(f"{self._path}: {gguf_name}: {error}") from error
        # float32 tensors are views of the read-only file and torch needs writable memory
        writable = np.require(values, np.float32, ["C", "W"])
        return torch.from_numpy(writable).reshape(tensor.shape)

    def _end_tokens(self) -> list[Any]:
        """Ends of text, turn and message, at each of which llama.cpp ends a generation."""
        found: list[Any] = []
        for key in _END_TOKENS:
            value = self._metadata.get(f"tokenizer.ggml.{key}")
            found += value if isinstance(value, list) else [value]
        return found

    def _config(self) -> dict[str, Any]:
        metadata, architecture = self._metadata, self._architecture
        if architecture not in _FAMILIES:
            raise model_unsupported(
                f"{self._path} is of GGUF architecture {architecture!r}; "
                f"supported: {', '.join(sorted(_FAMILIES))}"
            )
        if metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
            raise model_unsupported(
                f"{self._path} uses RoPE scaling, which is not read from GGUF files; use the "
                "model's safetensors"
            )
        config = {
            name: metadata[f"{architecture}.{key}"]
            for key, name in _CONFIG.items()
            if f"{architecture}.{key}" in metadata
        }
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        if "token_embd.weight" not in self._tensors:
            raise model_invalid(f"{self._path} has no token_embd.weight")
        return config | {
            "model_type": _FAMILIES[architecture].model_type,
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_output.bias" in self._tensors,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }


def _hf_names(tensors: Collection[str]) -> list[tuple[str, str]]:
    """`(Hugging Face name, GGUF name)` of every tensor that the decoder uses."""
    pairs = [(hf, gguf) for gguf, hf in _GLOBALS.items() if gguf in tensors]
    for gguf in tensors:
        match = _LAYER_TENSOR.fullmatch(gguf)
        if match and match[2] in _BY_GGUF:
            name = families.tensor_name(
                "LlamaForCausalLM", int(match[1]), _BY_GGUF[match[2]], match[3]
            )
            pairs.append((name, gguf))
    return pairs


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of q and k rows: (pair, 2) within a head becomes (2, pair)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


class _HeaderReader:
    """Parses the header; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def header(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        """Metadata, with arrays of strings replaced by their length, and the table of tensors."""
        if self._data[:4] != b"GGUF":
            raise self._damaged("it does not start with GGUF")
        self._at = 4
        version, tensors, entries = self._unpack("<IQQ")
        if version not in (2, 3):
            raise model_unsupported(f"{self._path} is of GGUF version {version}")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(*self._unpack("<I"))
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._damaged(f"alignment {alignment}")
        base = -(-self._at // alignment) * alignment
        return metadata, {name: self._place(name, base, *place) for name, place in table}

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._string()
        (dimensions,) = self._unpack("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"<{dimensions}Q")))  # ggml: fastest dimension first
        kind, offset = self._unpack("<IQ")
        return name, (shape, kind, offset)

    def _place(
        self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError as error:
            raise model_unsupported(f"{self._path}: {name}: {error}") from error
        total = prod(shape) // weights * size
        if base + offset + total > len(self._data):
            raise self._damaged(f"{name} exceeds the file; the download may be incomplete")
        return GgufTensor(shape, kind, base + offset, total)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._unpack("<" + _SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self._damaged(f"metadata of type {kind}")
        element, count = self._unpack("<IQ")
        if element in _SCALARS:
            return list(self._unpack(f"<{count}{_SCALARS[element]}"))
        if element != _STRING:
            raise self._damaged(f"an array of type {element}")
        for _ in range(count):
            self._skip(*self._unpack("<Q"))
        return count

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise self._damaged("it ends within its header")
        self._at += length

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        count = re.fullmatch(r"<(\d*)\D+", layout)
        if count and count[1] and int(count[1]) > len(self._data):
            raise self._damaged("an array is longer than the file")
        start = self._at
        self._skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)

    def _damaged(self, what: str) -> Refusal:
        return model_invalid(f"{self._path} is not a whole GGUF file: {what}")
