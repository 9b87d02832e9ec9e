"""Converting a checkpoint to the stored form, tensor by tensor, each module quantised on its own.

Modules in bitsandbytes NF4 are used unchanged; others are quantised from their stored values.
Norms, biases, embeddings and the head stay as stored.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from loraplex_model.base import families
from loraplex_model.base.progress import ByteProgress
from loraplex_model.base.refusal import Reason, Refusal, model_invalid
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.checkpoints import prequantised
from loraplex_model.checkpoints.checkpoint import TensorSource
from loraplex_model.checkpoints.control.ends import named_end_tokens
from loraplex_model.checkpoints.conversion.parts import OTHERS, PER_LAYER, write_parts
from loraplex_model.checkpoints.conversion.survey import survey
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.checkpoints.stored import StoredModel, StoredWriter
from loraplex_model.ops import nf4, quantise

_CHECKED = 1 << 22  # numbers that are looked at at once


class Quantise(Protocol):
    """Quantises the matrix [out, in] of one module. Raises `ValueError` if it is not finite."""

    def __call__(self, weight: torch.Tensor, /) -> NF4Matrix: ...


def convert(
    source: TensorSource, path: Path, *, name: str = "the model", kernels: Path | None = None
) -> StoredModel:
    """Writes the quantised model to `path`, with one dense matrix in memory at a time.

    Args:
        name: the model's name in the log.
        kernels: directory of compiled kernels.

    Raises:
        Refusal: MODEL_UNSUPPORTED, or MODEL_INVALID with the tensor or field that is missing, of
            another shape, not finite, or not part of such a model; CACHE_FAILED if the disk has no
            room for the stored model.
    """
    found = survey(source)
    require_room(path.parent, found.stored_bytes)
    config = found.config
    blocks = quantise.kernel(kernels, found.weights)
    most = OTHERS + PER_LAYER * config.num_layers
    with (
        ByteProgress(f"converting {name} to NF4", found.tensors, found.nbytes) as progress,
        SafetensorsFile(path, most) as file,
    ):
        writer = StoredWriter(file, config)
        reader = _SourceReader(source, found.embed, partial(nf4.quantise, blocks=blocks), progress)
        write_parts(config, reader, writer)
    return StoredModel(config, writer.fingerprint, named_ends(source, config.vocab_size))


def require_room(folder: Path, needed: int) -> None:
    """Raises `Refusal` (CACHE_FAILED) unless the disk of a folder has room for so many bytes.

    A folder that does not exist yet counts as on the disk of the one that will hold it.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Refusal(
            Reason.CACHE_FAILED,
            f"the converted model takes {needed / 1e9:.2f} GB, and the disk of {folder} has "
            f"{free / 1e9:.2f} GB free; free some space, or choose another folder with --cache",
        )


class _SourceReader:
    """A `PartReader` that reads the values, and refuses those that are not finite."""

    def __init__(
        self, source: TensorSource, embed: str, quantise: Quantise, progress: ByteProgress
    ) -> None:
        self._source, self._embed = source, embed
        self._quantise, self._progress = quantise, progress

    def dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._read(name, shape)
        if not _is_finite(tensor):
            raise _not_finite(name)
        return tensor

    def matrix(self, name: str, shape: tuple[int, int]) -> NF4Matrix:
        if prequantised.is_nf4(self._source, name):
            matrix = prequantised.read(self._source, name, shape)
            for each in prequantised.tensors(self._source, name):
                self._progress.advance(self._source.info(each).nbytes)
            return matrix
        try:
            return self._quantise(self._read(name, shape))
        except ValueError as error:
            raise _not_finite(name) from error

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        at = self._embed if name == families.EMBED else name
        tensor = self._source.read(at)
        assert tuple(tensor.shape) == shape, "the survey has compared shapes"
        self._progress.advance(self._source.info(at).nbytes)
        return tensor if tensor.dtype.itemsize <= 4 else tensor.float()


def _is_finite(tensor: torch.Tensor) -> bool:
    flat = tensor.reshape(-1)
    pieces = (flat[at : at + _CHECKED].aminmax() for at in range(0, flat.numel(), _CHECKED))
    return all(bool(each.isfinite()) for pair in pieces for each in pair)  # NaN is both


def _not_finite(name: str) -> Refusal:
    return model_invalid(
        f"{name} has values that are NaN, infinite or too large, so every answer would fail; fetch "
        "the model again, or choose another one"
    )


def named_ends(source: TensorSource, vocab_size: int) -> tuple[int, ...]:
    """The end tokens that the configurations of a checkpoint name, in the order of the files."""
    ids = named_end_tokens("configuration", source.config, vocab_size)
    ids += named_end_tokens("generation configuration", source.generation_config, vocab_size)
    return tuple(dict.fromkeys(ids))
