"""The survey of a checkpoint before its conversion: whether exactly the needed tensors exist.

Every fault that the configuration and the names, types and shapes of tensors show is found here,
before gigabytes are converted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from loraplex_model.base import families
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.fields import check_decoder
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.checkpoints import prequantised
from loraplex_model.checkpoints.checkpoint import TensorInfo, TensorSource
from loraplex_model.checkpoints.conversion.parts import write_parts
from loraplex_model.checkpoints.conversion.unread import refuse_unread
from loraplex_model.checkpoints.prequantised import FLOATS
from loraplex_model.ops.nf4 import NESTED_BLOCK, blocks_of

_COMPARED = 1 << 22  # numbers of the head that are compared with the embeddings at once
_SAMPLE, _SAMPLES = 1 << 12, 64  # numbers of a sample, and number of samples


@dataclass(frozen=True, slots=True)
class Survey:
    """What a checkpoint becomes, known without its values.

    Attributes:
        embed: name of the tensor that is read as the embeddings.
        tensors, nbytes: number and bytes of the tensors that are read.
        weights: number of weights that are quantised; those in NF4 already do not count.
        stored_bytes: size of the stored model.
        largest: bytes of the largest tensor that is read.
    """

    config: DecoderConfig
    embed: str
    tensors: int
    nbytes: int
    weights: int
    stored_bytes: int
    largest: int


def survey(source: TensorSource, *, sampled: bool = False) -> Survey:
    """Checks a checkpoint's configuration, and the types and shapes of its tensors.

    With `sampled` only some values of a head are compared with the embeddings, so that one that
    differs in a few others only passes for equal.

    Raises:
        Refusal: MODEL_UNSUPPORTED or MODEL_INVALID, with the name of the field or the tensor.
    """
    prequantised.refuse_unsupported(source.config)
    config = decoder_config(source.config)
    if source.rope_divisors:
        config = _divided(config, source.rope_divisors)
    config, embed = _with_head(source, config, sampled)
    reader, counter = _ShapeReader(source, embed), _ByteCounter()
    write_parts(config, reader, counter)
    left = set(source.names()) - reader.names
    if config.tie_embeddings:
        left.discard(families.LM_HEAD)  # equal to the embeddings
    refuse_unread(left, source.config, config.architecture, config.num_layers)
    return Survey(
        config,
        embed,
        len(reader.names),
        reader.nbytes,
        reader.weights,
        counter.stored_bytes,
        reader.largest,
    )


def _divided(config: DecoderConfig, divisors: tuple[float, ...]) -> DecoderConfig:
    """The configuration with its rotary frequencies divided."""
    if len(divisors) != len(config.rope_inv_freq) or not all(by > 0 for by in divisors):
        raise model_invalid(
            f"the model has {len(divisors)} divisors of rotary frequencies, which must be "
            f"{len(config.rope_inv_freq)} positive numbers; fetch the model again"
        )
    pairs = zip(config.rope_inv_freq, divisors, strict=True)
    config = dataclasses.replace(config, rope_inv_freq=tuple(f / by for f, by in pairs))
    check_decoder(config)
    return config


def _with_head(
    source: TensorSource, config: DecoderConfig, sampled: bool
) -> tuple[DecoderConfig, str]:
    """The configuration with a head of its own if the checkpoint has one, and the embeddings' name.

    As in transformers, a head that differs from the embeddings is used although the configuration
    ties them, and the one of both that is there stands for both.
    """
    names = source.names()
    if families.LM_HEAD not in names:
        if not config.tie_embeddings:
            raise model_invalid(
                f"the checkpoint has no {families.LM_HEAD}, and its configuration has "
                "tie_word_embeddings false; set it to true if the embeddings are the head, or "
                "fetch the model again"
            )
        return config, families.EMBED
    if not config.tie_embeddings:
        return config, families.EMBED
    if families.EMBED not in names:
        return config, families.LM_HEAD
    if _are_equal(source, families.EMBED, families.LM_HEAD, sampled):
        return config, families.EMBED
    return dataclasses.replace(config, tie_embeddings=False), families.EMBED


def _are_equal(source: TensorSource, one: str, other: str, sampled: bool) -> bool:
    if source.info(one).shape != source.info(other).shape:
        return False
    first, second = source.read(one).reshape(-1), source.read(other).reshape(-1)
    count, length = first.numel(), _SAMPLE if sampled else _COMPARED
    starts = range(0, count, max(length, count // _SAMPLES) if sampled else length)
    return all(
        torch.equal(first[at : at + length].double(), second[at : at + length].double())
        for at in starts
    )


class _ShapeReader:
    """A `PartReader` that checks types and shapes, and returns tensors without values.

    Attributes:
        names: the tensors that were read, by their names in the checkpoint.
        nbytes: their bytes.
        weights: number of weights that have to be quantised.
        largest: bytes of the largest tensor.
    """

    def __init__(self, source: TensorSource, embed: str) -> None:
        self._source, self._embed = source, embed
        self.names: set[str] = set()
        self.nbytes = self.weights = self.largest = 0

    def dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        info = self._use(self._embed if name == families.EMBED else name)
        if info.dtype not in FLOATS:
            raise model_unsupported(
                f"{name} is of type {info.dtype}, so it is quantised in a way that is not "
                "supported; use a checkpoint that is not quantised, or one whose layers' matrices "
                "are in bitsandbytes NF4, but not its embeddings, head, norms and routers"
            )
        if info.shape != shape:
            raise model_invalid(
                f"{name} is {info.dtype} {list(info.shape)}, but the configuration needs "
                f"{list(shape)}; correct it, or fetch the model again"
            )
        # as it is stored: F64 becomes F32
        dtype = torch.float32 if FLOATS[info.dtype] > 2 else torch.bfloat16
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(self, name: str, shape: tuple[int, int]) -> NF4Matrix:
        if prequantised.is_nf4(self._source, name):
            for each in prequantised.tensors(self._source, name):
                self._use(each)
            prequantised.check(self._source, name, shape)
        else:
            self.dense(name, shape)
            self.weights += shape[0] * shape[1]
        blocks = blocks_of(*shape)
        return NF4Matrix(
            shape,
            torch.empty(-(-shape[0] * shape[1] // 2), dtype=torch.uint8, device="meta"),
            torch.empty(blocks, dtype=torch.uint8, device="meta"),
            (torch.empty(-(-blocks // NESTED_BLOCK), device="meta"),),
            (0.0,),
            (shape[0],),
        )

    def _use(self, name: str) -> TensorInfo:
        info = self._source.info(name)
        if name not in self.names:
            self.names.add(name)
            self.nbytes += info.nbytes
            self.largest = max(self.largest, info.nbytes)
        return info


class _ByteCounter:
    """A `PartWriter` that only adds up bytes."""

    def __init__(self) -> None:
        self.stored_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.stored_bytes += tensor.nbytes

    def add_matrix(self, name: str, matrix: NF4Matrix) -> None:
        parts = (matrix.packed, matrix.absmax, *matrix.absmax_scales)
        self.stored_bytes += sum(part.nbytes for part in parts)
