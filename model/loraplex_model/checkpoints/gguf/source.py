"""GGUF files as a source of Hugging Face tensors.

The file has its own configuration, with llama.cpp's key names, and quantised tensors, with
llama.cpp's tensor names. In the files of some architectures the rows of q and k are interleaved in
pairs within each head, and this module restores Hugging Face's two halves; Gemma's norms hold
1 + w. The `gguf` package dequantises values to float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraplex_model.base.families import FAMILIES
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.checkpoints.checkpoint import TensorInfo
from loraplex_model.checkpoints.gguf import keys, kinds, names, parts
from loraplex_model.checkpoints.gguf.architectures import ARCHITECTURES, GgufArchitecture
from loraplex_model.checkpoints.gguf.header import GgufFile, GgufTensor, LongValue
from loraplex_model.checkpoints.gguf.names import Pieces, TensorPiece
from loraplex_model.checkpoints.gguf.settings import GgufSettings
from loraplex_model.checkpoints.gguf.values import dequantised

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
        mixtures = [name for name, row in ARCHITECTURES.items() if row.experts]
        kinds.refuse_others(path, self._metadata, self._tensors, ARCHITECTURES, mixtures)
        architecture = str(self._metadata["general.architecture"])
        row = ARCHITECTURES[architecture]
        settings = GgufSettings(path, architecture, self._metadata)
        config = keys.config_of(settings, row, self._tensors)
        self._family = FAMILIES[config["architectures"][0]]
        config |= self._from_tensors(config)
        used, self.rope_divisors = self._add_divisors(row, config)
        self.config: Mapping[str, Any] = config
        decoder = decoder_config(config)
        shapes = {name: tensor.shape for name, (_, tensor) in self._tensors.items()}
        self._pieces = names.assign(path, shapes, architecture, decoder, used)
        self._offset = decoder.norm_offset
        self.generation_config: Mapping[str, Any] = {"eos_token_id": self._end_tokens()}
        self.has_tokenizer = "tokenizer.ggml.model" in self._metadata

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._pieces.keys()

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        shapes: list[tuple[int, ...]] = []
        nbytes = 0
        for piece in self._pieces_of(name):
            if piece.is_zero:
                shapes.append((piece.first,))
                continue
            tensor = self._tensors[piece.tensor][1]
            shape, size = tensor.shape, tensor.size
            if piece.end is not None:
                rows = piece.end - piece.first
                shape, size = (rows, *shape[1:]), size // shape[0] * rows
            shapes.append(shape[1:] if piece.one else shape)
            nbytes += size
        shape = (
            shapes[0] if len(shapes) == 1 else (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        )
        return TensorInfo(shape, "F32", nbytes)

    def types(self) -> Mapping[str, int]:
        """Bytes of the tensors of each of GGUF's types: "Q4_K"."""
        from gguf import GGMLQuantizationType

        types: Counter[str] = Counter()
        for _, tensor in self._tensors.values():
            types[GGMLQuantizationType(tensor.kind).name] += tensor.size
        return types

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource`: float32, in Hugging Face's layout."""
        found = [self._piece(piece) for piece in self._pieces_of(name)]
        values = found[0] if len(found) == 1 else torch.cat(found)
        heads = {
            ".q_proj.": self.config["num_attention_heads"],
            ".k_proj.": self.config["num_key_value_heads"],
        }
        if self._family.gguf_interleaved:
            for part, count in heads.items():
                if part in name:
                    values = self._halves(name, values, count)
        if self._offset and name.endswith("norm.weight"):
            values = values - self._offset
        return values

    def _pieces_of(self, name: str) -> Pieces:
        if name not in self._pieces:
            raise model_invalid(f"{self._path} has no tensor for {name}")
        return self._pieces[name]

    def _piece(self, piece: TensorPiece) -> torch.Tensor:
        if piece.is_zero:
            return torch.zeros(piece.first)
        values = self._dequantise(piece.tensor, piece.first, piece.end)
        return values[0] if piece.one else values

    def _dequantise(self, gguf_name: str, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `first` to `end` of a tensor, or all of it, in float32."""
        from gguf import GGMLQuantizationType

        file, tensor = self._tensors[gguf_name]
        kind = GGMLQuantizationType(tensor.kind)
        shape, start, size = tensor.shape, tensor.start, tensor.size
        if end is not None:
            row = size // shape[0]
            shape, start, size = (end - first, *shape[1:]), start + first * row, (end - first) * row
        raw = np.frombuffer(file.data, np.uint8, size, start)
        try:
            return dequantised(raw, shape, kind)
        except (NotImplementedError, ValueError) as error:
            raise model_unsupported(f"{file.path}: {gguf_name}: {error}") from error

    def _halves(self, name: str, rows: torch.Tensor, heads: int) -> torch.Tensor:
        if rows.ndim == 0 or rows.shape[0] % (2 * heads):
            raise model_invalid(
                f"{self._path}: the tensor of {name} has shape {list(rows.shape)}, which is not a "
                f"whole number of pairs for each of {heads} heads"
            )
        return halves(rows, heads)

    def _from_tensors(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of config.json that follow from the tensors, and the ends of a text."""
        shape = self._tensors[names.EMBED][1].shape if names.EMBED in self._tensors else ()
        if len(shape) != 2:
            raise model_invalid(
                f"{self._path} has no tensor {names.EMBED} with a row for each token"
            )
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, LongValue) and tokens.length > shape[0]:
            raise model_invalid(
                f"{self._path} has {tokens.length} tokens (tokenizer.ggml.tokens), but "
                f"{names.EMBED} has {shape[0]} rows"
            )
        biased = names.biased_modules(self._tensors)
        options: dict[str, Any] = {}
        for name, modules in names.BIASED.items():
            option = self._family.settings.get(name)
            if isinstance(option, str):
                options[option] = options.get(option, False) or not biased.isdisjoint(modules)
        return options | {
            "vocab_size": shape[0],
            "tie_word_embeddings": names.HEAD not in self._tensors,
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def _add_divisors(
        self, row: GgufArchitecture, config: dict[str, Any]
    ) -> tuple[set[str], tuple[float, ...]]:
        """Adds LongRoPE's divisors to `config`.

        Returns the names of all tensors of divisors, and those of Llama 3's scaling.
        """
        parameters, width = config["rope_parameters"], config["head_dim"]
        if parameters.get("rope_type") == "longrope":
            # Phi-3's configuration has the original context outside of the rotary parameters too
            original = "original_max_position_embeddings"
            config[original] = parameters[original]
            width = int(width * parameters.get("partial_rotary_factor", 1.0))
            parameters["long_factor"] = self._divisors(names.LONG_FACTORS, width)
            parameters["short_factor"] = self._divisors(names.SHORT_FACTORS, width)
            return {names.LONG_FACTORS, names.SHORT_FACTORS}, ()
        if not row.divided or names.FACTORS not in self._tensors:
            return set(), ()
        if parameters["rope_type"] != "default":
            raise model_unsupported(
                f"{self._path} scales the rotary frequencies twice, by {names.FACTORS} and by "
                "rope.scaling"
            )
        return {names.FACTORS}, tuple(self._divisors(names.FACTORS, width))

    def _divisors(self, name: str, width: int) -> list[float]:
        if name not in self._tensors:
            raise model_invalid(f"{self._path} has no tensor {name}")
        divisors = self._dequantise(name)
        if divisors.shape != (width // 2,) or not bool((divisors > 0).all()):
            raise model_invalid(f"{self._path}: {name} must hold {width // 2} numbers above 0")
        return [float(divisor) for divisor in divisors]

    def _end_tokens(self) -> list[Any]:
        """Ends of text, turn and message, at each of which llama.cpp ends a generation."""
        found: list[Any] = []
        for key in _END_TOKENS:
            value = self._metadata.get(f"tokenizer.ggml.{key}")
            found += value if isinstance(value, list) else [value]
        return found


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of q and k rows: (pair, 2) within a head becomes (2, pair)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
