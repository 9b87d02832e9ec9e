"""HRA: y = W H x + bias, where H is a product of r Householder reflections of the input.

H - 1 has rank r, so W H = W + B A, with A the vectors of the reflections and B from the served W.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    ENDINGS,
    EXCLUDED_OPTION,
    TARGET_OPTIONS,
    FoldedReading,
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

_VECTORS = "hra_u"


@dataclass(frozen=True, slots=True)
class Reflections:
    """HRA's vectors of each module.

    Attributes:
        orthogonal: whether the vectors are made orthogonal by Gram and Schmidt's method.
    """

    r: int
    orthogonal: bool
    marks: Collection[str] = (_VECTORS,)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules with `r` vectors each."""
        file.check_rank("r", self.r)  # the work at load grows with its square
        found = []
        for site in adapted:
            fan_in, _ = shape_of(file, site)
            tensors = {_VECTORS: file.require(site, _VECTORS)}
            held = measured(file, site, tensors, {_VECTORS: (fan_in, "r")})
            if held is not None and states(file, site, held["r"], self.r, "r", "rank"):
                settings = {"orthogonal": float(self.orthogonal)}
                found += folded(file, site, "hra", tensors, self.r, settings=settings)
        return found


def _read(reader: Reader) -> FoldedReading | None:
    rank, targets = reader.integer("r"), reader.targets()
    orthogonal = reader.flag("apply_GS")
    bias = read_bias(reader, "hra_only")
    return None if rank is None else FoldedReading(targets, Reflections(rank, orthogonal), bias)


HRA = Kind(
    peft_type="HRA",
    summary="HRA: Householder reflections of a module's input",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        "apply_GS": served("vectors that are nearly dependent are refused at load"),
        "bias": served("none, all, hra_only"),
        "r": served("uses the served weight"),
    },
    endings={_VECTORS: "", **BIAS_ENDINGS, **ENDINGS},
    read=_read,
)
