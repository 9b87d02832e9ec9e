"""RANDLORA: a sum over random bases that all modules share, scaled by trained vectors.

There are as many bases as full rank takes, so the folded rank is the module's smaller width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site

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
    widest,
)
from loraplex_adapters.format.kinds.whole import BIAS_ENDINGS
from loraplex_adapters.format.modules import SHARED
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.support import ignored, served
from loraplex_adapters.format.targets import Targets

_BASES = ("randlora_A", "randlora_B")
_SHARED = {role: f"base_model.{role}" for role in _BASES}
_VECTORS = ("randlora_lambda", "randlora_gamma")
_UNSAVED = (
    "is false, and the random bases cannot be drawn again: their numbers depend on the machine "
    "that drew them. There, give the weights to an adapter with the same projection_prng_key and "
    "save_projection true, and save that"
)
_OWNER = "by r and the widest target modules of this base it"


@dataclass(frozen=True, slots=True)
class RandomBases:
    """RandLoRA's vectors of each module, and the bases that the modules share."""

    r: int
    alpha: float
    targets: Targets
    marks: Collection[str] = _VECTORS

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose vectors fit, if the bases do.

        PEFT writes the bases once for all modules, and again for each, which must be equal.
        """
        widths = widest(file, self.targets)
        shapes: dict[str, tuple[Size, ...]] = {
            "randlora_A": (self.r, 1, min(widths)),
            "randlora_B": (max(widths), -(-min(widths) // self.r), self.r),
        }
        shared = {role: file.require(SHARED, name) for role, name in _SHARED.items()}
        fits = measured(file, SHARED, shared, shapes, _OWNER) is not None
        found = []
        for site in adapted:
            copies = {role: file.claim(site, role) for role in _BASES}
            module = self._module(file, site, shared if fits else None)
            held = {role: copy for role, copy in copies.items() if copy is not None}
            if fits and measured(file, site, held, shapes, _OWNER) is not None:
                file.twins += [
                    (first, held[r]) for r, first in shared.items() if first and r in held
                ]
                found += module
        return found

    def _module(
        self, file: Placement, site: Site, shared: dict[str, TensorLocation | None] | None
    ) -> list[ModuleSpec]:
        small = min(shape_of(file, site))
        bases = -(-small // self.r)
        tensors = {role: file.require(site, role) for role in _VECTORS}
        shapes: dict[str, tuple[Size, ...]] = {
            "randlora_lambda": ("r", "bases"),
            "randlora_gamma": ("bases", small),
        }
        scale = self.alpha / self.r
        file.check_scale(site, scale, "randlora_alpha")
        held = measured(file, site, tensors, shapes)
        if held is None or shared is None:
            return []
        if not states(file, site, held["r"], self.r, "r", "rank"):
            return []
        if not states(file, site, held["bases"], bases, "r", "bases"):
            return []
        parts = f"{bases} bases x {self.r}"
        tensors |= shared
        return folded(file, site, "randlora", tensors, bases * self.r, parts, scale=scale)


def _read(reader: Reader) -> FoldedReading | None:
    r, alpha, targets = reader.integer("r"), reader.number("randlora_alpha"), reader.targets()
    bias = read_bias(reader, "randlora_only")
    if "save_projection" in reader.config and not reader.flag("save_projection"):
        reader.unsupported("save_projection", _UNSAVED)
        return None
    if r is None or alpha is None:
        return None
    return FoldedReading(targets, RandomBases(r, alpha, targets), bias)


RANDLORA = Kind(
    peft_type="RANDLORA",
    summary="RandLoRA: random bases of full rank, for modules with a small side",
    options={
        **TARGET_OPTIONS,
        **TRANSPOSED_OPTION,
        "bias": served("none, all, randlora_only"),
        "projection_prng_key": ignored("the bases are in the file"),
        "r": served("folded rank is the module's smaller width"),
        "randlora_alpha": served(),
        "randlora_dropout": DROPOUT,
        "save_projection": served("true; PEFT draws other bases on other machines"),
        "sparse": ignored("the bases are in the file"),
        "very_sparse": ignored("the bases are in the file"),
    },
    endings={
        **dict.fromkeys(_VECTORS, ""),
        **dict.fromkeys(_BASES, "save_projection"),
        **BIAS_ENDINGS,
        **ENDINGS,
    },
    shared=dict.fromkeys(_SHARED.values(), "save_projection"),
    read=_read,
)
