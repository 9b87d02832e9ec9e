"""DEFT and PaRa: y = W x + Q (s R - P W) x, where a projection P removes what R replaces; rank r.

Q is P's own basis. The removed part comes from the served W.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site

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
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served

_DIRECTIONS, _INJECTED = "deft_P", "deft_R"


@dataclass(frozen=True, slots=True)
class Replacements:
    """DEFT's tensors of each module.

    Attributes:
        alpha: scale times rank; 0 for a scale of 1.
        orthogonal: whether Q is the basis that a QR decomposition gives.
        removes_only: whether nothing is put in place of what is removed (PaRa).
    """

    r: int
    alpha: float
    orthogonal: bool
    removes_only: bool
    marks: Collection[str] = (_DIRECTIONS, _INJECTED)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules with `r` directions, or with as many as a narrower output has."""
        found = []
        for site in adapted:
            fan_in, fan_out = shape_of(file, site)
            rank = min(self.r, fan_out)
            roles = (_DIRECTIONS,) if self.removes_only else (_DIRECTIONS, _INJECTED)
            tensors = {role: file.require(site, role) for role in roles}
            shapes: dict[str, tuple[Size, ...]] = {
                _DIRECTIONS: (fan_out, "r"),
                _INJECTED: ("r", fan_in),
            }
            held = measured(file, site, tensors, shapes)
            scale = self.alpha / rank if self.alpha else 1.0
            file.check_scale(site, scale, "alpha")
            if held is not None and states(file, site, held["r"], rank, "r", "rank"):
                settings = {"orthogonal": float(self.orthogonal), "scale": scale}
                found += folded(file, site, "deft", tensors, rank, settings=settings)
        return found


def _read(reader: Reader) -> FoldedReading | None:
    rank, targets = reader.integer("r"), reader.targets()
    alpha = reader.number("alpha", 0.0)
    method = reader.choice("decomposition_method", {"relu": False, "qr": True}, False)
    removes_only = reader.flag("para")
    bias = read_bias(reader, "deft_only")
    if rank is None or alpha is None:
        return None
    return FoldedReading(targets, Replacements(rank, alpha, method, removes_only), bias)


DEFT = Kind(
    peft_type="DEFT",
    summary="DEFT, PaRa: replaces or removes what a module writes in some directions",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        **TRANSPOSED_OPTION,
        "alpha": served("a scale of 1 if null"),
        "bias": served("none, all, deft_only"),
        "decomposition_method": served("relu, qr"),
        "deft_dropout": DROPOUT,
        "init_scale": ignored("initial values only"),
        "para": served("removes only"),
        "r": served("uses the served weight"),
    },
    endings={_DIRECTIONS: "", _INJECTED: "", **BIAS_ENDINGS, **ENDINGS},
    read=_read,
)
