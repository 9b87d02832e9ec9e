"""GRALORA: k * k blocks with factors of their own, of folded rank k * r, plus a plain LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loraplex_model.base.config import Site
from loraplex_model.base.refusal import Reason

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    DROPOUT,
    ENDINGS,
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
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import served

_BLOCKS = ("gralora_A", "gralora_B")
_HYBRID = ("gralora_A_general", "gralora_B_general")


@dataclass(frozen=True, slots=True)
class BlockFactors:
    """GraLoRA's factors of each module.

    Attributes:
        r: rank of a block of the input, which k blocks of the output share.
        k: number of blocks of the input, and of the output.
        hybrid_r: rank of the plain LoRA that is added to the blocks; 0 if there is none.
    """

    r: int
    k: int
    hybrid_r: int
    alpha: float
    marks: Collection[str] = (*_BLOCKS, *(f"{role}.weight" for role in _HYBRID))

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules that k divides into blocks of the configured ranks."""
        return [module for site in adapted for module in self._module(file, site)]

    def _module(self, file: Placement, site: Site) -> list[ModuleSpec]:
        fan_in, fan_out = shape_of(file, site)
        tensors = {role: file.require(site, role) for role in _BLOCKS}
        if self.hybrid_r:
            tensors |= {role: file.require(site, f"{role}.weight") for role in _HYBRID}
        if fan_in % self.k or fan_out % self.k:
            message = f"gralora_k is {self.k}, which does not divide {file.path(site)} of "
            message += f"{fan_out} x {fan_in}"
            file.find(Reason.BASE_MODEL_MISMATCH, message, "gralora_k")
            return []
        shapes: dict[str, tuple[Size, ...]] = {
            "gralora_A": ("k", fan_in // self.k, "r"),
            "gralora_B": ("k", "r", fan_out // self.k),
            "gralora_A_general": ("hybrid_r", fan_in),
            "gralora_B_general": (fan_out, "hybrid_r"),
        }
        scale = self.alpha / (self.r + self.hybrid_r)
        file.check_scale(site, scale, "alpha")
        held = measured(file, site, tensors, shapes)
        if held is None or not self._states(file, site, held):
            return []
        parts = f"{self.k} x {self.r}" + (f" + {self.hybrid_r}" if self.hybrid_r else "")
        columns = self.k * self.r + self.hybrid_r
        return folded(file, site, "gralora", tensors, columns, parts, scale=scale)

    def _states(self, file: Placement, site: Site, held: Mapping[str, int]) -> bool:
        hybrid = held.get("hybrid_r", 0)
        return (
            states(file, site, held["k"], self.k, "gralora_k", "gralora_k")
            and states(file, site, held["r"], self.r, "r", "rank")
            and states(file, site, hybrid, self.hybrid_r, "hybrid_r", "hybrid rank")
        )


def _read(reader: Reader) -> FoldedReading | None:
    r, alpha, targets = reader.integer("r"), reader.number("alpha"), reader.targets()
    k: int | None = 2
    if reader.config.get("gralora_k") is not None:
        k = reader.integer("gralora_k")
    hybrid: int | None = 0
    if reader.config.get("hybrid_r") not in (None, 0):
        hybrid = reader.integer("hybrid_r")
    bias = read_bias(reader, "gralora_only")
    if r is None or alpha is None or k is None or hybrid is None:
        return None
    if r % k:
        reader.invalid("r", f"is {r}, which gralora_k {k} does not divide")
        return None
    return FoldedReading(targets, BlockFactors(r, k, hybrid, alpha), bias)


GRALORA = Kind(
    peft_type="GRALORA",
    summary="GraLoRA: LoRA by blocks, plain or hybrid",
    options={
        **TARGET_OPTIONS,
        **TRANSPOSED_OPTION,
        "alpha": served("scale is alpha / (r + hybrid_r)"),
        "bias": served("none, all, gralora_only"),
        "gralora_dropout": DROPOUT,
        "gralora_k": served(),
        "hybrid_r": served(),
        "r": served("folded rank gralora_k * r + hybrid_r"),
    },
    endings={
        **dict.fromkeys(_BLOCKS, ""),
        **{f"{role}.weight": "hybrid_r" for role in _HYBRID},
        **BIAS_ENDINGS,
        **ENDINGS,
    },
    read=_read,
)
