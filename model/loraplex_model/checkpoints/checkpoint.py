"""The source of a base model: a checkpoint whose tensors are read by name, one at a time.

A model is given as a directory (safetensors), a `.gguf` file, or the id of a hub repository. Only
the last causes network access. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from loraplex_model.base import families
from loraplex_model.base.refusal import Reason, Refusal, model_invalid, model_unsupported
from loraplex_model.checkpoints.gguf import parts

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READ = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        dtype: type of its elements when it is read, by the name in safetensors files: "BF16".
        nbytes: its size in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class TensorSource(Protocol):
    """A checkpoint. Callers read one tensor and drop it before they read the next.

    Attributes:
        config: the contents of `config.json`, or the equivalent of another format.
        generation_config: the contents of `generation_config.json`; empty if there is none.
        rope_divisors: divisors of the rotary frequencies of `config`; () for none.
        has_tokenizer: True if the checkpoint includes a tokenizer.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    rope_divisors: tuple[float, ...]
    has_tokenizer: bool

    def names(self) -> Collection[str]:
        """Hugging Face names of all tensors."""

    def info(self, name: str) -> TensorInfo:
        """Shape and type of a tensor. Raises `Refusal` (MODEL_INVALID) if it does not exist."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored (any floating type, or bitsandbytes' bytes).

        Raises `Refusal` (MODEL_INVALID) if it does not exist or its file is damaged.
        """


def locate(model: str) -> Path:
    """The path of a model: an existing directory or GGUF file, or the download of a hub id.

    Raises `Refusal`: MODEL_NOT_FOUND, MODEL_UNAVAILABLE.
    """
    path = Path(model).expanduser()
    if path.exists():
        if path.is_dir():
            _refuse_gguf_files(path)
            return path.resolve()
        return _first_part(path)
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model):
        raise Refusal(
            Reason.MODEL_NOT_FOUND,
            f"there is no model at {model}; give a directory with config.json and safetensors, "
            "a .gguf file, a hub id (owner/name), or nothing for the default model",
        )
    return _snapshot(model)


def locate_here(model: str) -> Path | None:
    """As `locate`, but nothing is fetched: None for a hub id whose files are not all here."""
    if Path(model).expanduser().exists() or not _HUB_ID.fullmatch(model):
        return locate(model)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(model, local_files_only=True))
        _shards(path)
    except Exception:  # the hub's own errors for what is not here, or only in part
        return None
    return path if (path / "config.json").exists() else None


def _first_part(path: Path) -> Path:
    """The first file of a model that is split into several, which has its tokenizer."""
    # only the directory: the hub's cache holds links to files that are named by their digests
    path = path.parent.resolve() / path.name
    first = parts.names_of(path)[0]
    return first if first.is_file() else path


def _refuse_gguf_files(directory: Path) -> None:
    files = sorted(directory.glob("*.gguf"))
    if files and not (directory / "config.json").exists():
        raise model_invalid(
            f"{directory} holds GGUF files, not a Hugging Face checkpoint; give one of them, such "
            f"as {files[0]}"
        )


def _snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_READ)))
    except Exception as error:  # the hub's own errors, and whatever its HTTP client raises
        raise Refusal(
            Reason.MODEL_UNAVAILABLE,
            f"{repository} is no directory here, and it could not be fetched from the hub: {error}",
        ) from error


def files_of(path: Path) -> tuple[Path, ...]:
    """All files that the loaded model depends on, sorted."""
    if path.is_file():
        return tuple(part for part in parts.names_of(path) if part.is_file())
    found = {file for pattern in _READ for file in path.glob(pattern) if file.is_file()}
    return tuple(sorted(found))


def open_source(path: Path) -> TensorSource:
    """Opens a directory or a GGUF file. Raises `Refusal`: MODEL_INVALID, MODEL_UNSUPPORTED."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise model_unsupported(f"{path} is neither a directory nor a .gguf file")
        from loraplex_model.checkpoints.gguf.source import GgufSource

        return GgufSource(path)
    return SafetensorsSource(path)


class SafetensorsSource:
    """A Hugging Face directory with one safetensors file, or several and an index."""

    def __init__(self, directory: Path) -> None:
        self.config: Mapping[str, Any] = read_json(directory / "config.json")
        generation = directory / "generation_config.json"
        self.generation_config: Mapping[str, Any] = (
            read_json(generation) if generation.exists() else {}
        )
        self.rope_divisors: tuple[float, ...] = ()
        self.has_tokenizer = any((directory / name).exists() for name in _TOKENIZERS)
        self._files: dict[str, tuple[Any, str]] = {}  # the open file of each tensor, its name there
        for shard in _shards(directory):
            try:
                file: Any = safe_open(shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise model_invalid(
                    f"{shard} is damaged or cut short ({error}); fetch it again"
                ) from error
            except RuntimeError as error:  # of torch, which maps the file
                raise model_unsupported(
                    f"{shard} cannot be mapped ({error}); save the model again in files that are "
                    "smaller than the memory of the machine (max_shard_size)"
                ) from error
            names: list[str] = file.keys()
            for name in names:
                text_name = self._text_name(name)
                if text_name in self._files:
                    raise model_invalid(
                        f"the checkpoint in {directory} holds {text_name} twice, so it is not "
                        "clear which one is meant; remove files that are not part of the model"
                    )
                self._files[text_name] = file, name

    def names(self) -> Collection[str]:
        """See `TensorSource`."""
        return self._files.keys()

    def info(self, name: str) -> TensorInfo:
        """See `TensorSource`."""
        file, own_name = self._place(name)
        piece = file.get_slice(own_name)
        shape, dtype = tuple(piece.get_shape()), str(piece.get_dtype())
        return TensorInfo(shape, dtype, math.prod(shape) * _bits(dtype) // 8)

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource`. The tensor is a view of the mapped file."""
        file, own_name = self._place(name)
        tensor: torch.Tensor = file.get_tensor(own_name)
        return tensor

    def _place(self, name: str) -> tuple[Any, str]:
        """The file that holds a tensor, and the tensor's name there."""
        if name not in self._files:
            raise model_invalid(
                f"the checkpoint has no tensor {name}, which its configuration needs; correct it, "
                "or fetch the model again"
            )
        return self._files[name]

    def _text_name(self, name: str) -> str:
        """The name that a tensor of a multimodal model's text decoder has in a text model."""
        if "text_config" not in self.config:
            return name
        for prefix, instead in families.TEXT_PREFIXES.items():
            if name.startswith(prefix):
                return instead + name.removeprefix(prefix)
        return name


def _shards(directory: Path) -> list[Path]:
    index, single = directory / INDEX, directory / SINGLE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise model_invalid(f"{index} has no weight_map; fetch the model again")
        shards = [directory / name for name in sorted(set(names))]
        if any(shard.parent != directory for shard in shards):
            raise model_invalid(f"{index} points outside of its directory")
    elif single.exists():
        shards = [single]
    elif list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise model_unsupported(
            f"{directory} holds pickled weights only, which can run code when opened; "
            "convert them to safetensors"
        )
    else:
        raise model_invalid(f"{directory} has neither {SINGLE} nor {INDEX}")
    for shard in shards:
        if not shard.is_file():
            raise model_invalid(f"{shard} is missing; fetch the model again")
    return shards


def _bits(dtype: str) -> int:
    """Size of an element, from the number in the name of its type; one byte if there is none."""
    digits = dtype.lstrip("BFIU").partition("_")[0]
    return int(digits) if digits.isdecimal() else 8


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `Refusal` (MODEL_INVALID) if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise model_invalid(f"{path} cannot be read: {error}; fetch the model again") from error
    if not isinstance(value, dict):
        raise model_invalid(f"{path} is not a JSON object")
    return value
