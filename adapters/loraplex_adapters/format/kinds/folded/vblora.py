"""VBLORA: y += B A x, whose rows and columns are made of pieces from one bank of vectors; rank r.

Each piece is a mean of the `topk` vectors with the largest logits, weighted by their softmax.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    DROPOUT,
    ENDINGS,
    EXCLUDED_OPTION,
    TARGET_OPTIONS,
    TRANSPOSED_OPTION,
    FoldedReading,
    Size,
    folded,
    measured,
    read_bias,
    shape_of,
    states,
)
from loraplex_adapters.format.kinds.whole import BIAS_ENDINGS
from loraplex_adapters.format.modules import SHARED
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, refused, served

_BANK = "base_model.vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass(frozen=True, slots=True)
class Pieces:
    """VB-LoRA's bank of vectors, and the logits of each module."""

    r: int
    topk: int
    vectors: int
    length: int
    marks: Collection[str] = _LOGITS

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose pieces fit their widths and the bank."""
        file.check_rank("r", self.r)
        bank = file.require(SHARED, _BANK)
        if bank is not None and bank.shape != (self.vectors, self.length):
            message = f"{_BANK} has shape {list(bank.shape)}; num_vectors and vector_length "
            message += f"need {[self.vectors, self.length]}"
            file.find(Reason.ADAPTER_INVALID, message, _BANK)
            bank = None
        found = []
        for site in adapted:
            fan_in, fan_out = shape_of(file, site)
            tensors = {role: file.require(site, role) for role in _LOGITS}
            if fan_in % self.length or fan_out % self.length:
                message = f"vector_length is {self.length}, which does not divide the widths of "
                message += f"{file.path(site)}, {fan_in} and {fan_out}"
                file.find(Reason.BASE_MODEL_MISMATCH, message, "vector_length")
                continue
            shapes: dict[str, tuple[Size, ...]] = {
                _LOGITS[0]: ("r", fan_in // self.length, self.vectors),
                _LOGITS[1]: (fan_out // self.length, "r", self.vectors),
            }
            held = measured(file, site, tensors, shapes)
            if held is not None and states(file, site, held["r"], self.r, "r", "rank"):
                settings = {"topk": float(self.topk)}
                every = {**tensors, _BANK: bank}
                found += folded(file, site, "vblora", every, self.r, settings=settings)
        return [] if bank is None else found


def _read(reader: Reader) -> FoldedReading | None:
    targets = reader.targets()
    bias = read_bias(reader, "vblora_only")
    numbers = [reader.integer(key) for key in ("r", "topk", "num_vectors", "vector_length")]
    rank, topk, vectors, length = numbers
    if rank is None or topk is None or vectors is None or length is None:
        return None
    if topk > vectors:
        reader.invalid("topk", f"is {topk}, and num_vectors is {vectors}")
        return None
    return FoldedReading(targets, Pieces(rank, topk, vectors, length), bias)


VBLORA = Kind(
    peft_type="VBLORA",
    summary="VB-LoRA: factors made of vectors from a shared bank",
    options={
        **{key: option for key, option in TARGET_OPTIONS.items() if key != "init_weights"},
        **EXCLUDED_OPTION,
        **TRANSPOSED_OPTION,
        "bias": served("none, all, vblora_only"),
        "init_logits_std": ignored("initial values only"),
        "init_vector_bank_bound": ignored("initial values only"),
        "num_vectors": served(),
        "r": served(),
        "save_only_topk_weights": refused("a form with integer indices; save it without"),
        "topk": served(),
        "vblora_dropout": DROPOUT,
        "vector_length": served("divides the modules' widths"),
    },
    endings={**dict.fromkeys(_LOGITS, ""), **BIAS_ENDINGS, **ENDINGS},
    read=_read,
    shared={_BANK: ""},
)
