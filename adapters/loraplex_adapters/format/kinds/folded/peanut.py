"""PEANUT: y += s B f(W^T A^T)^T x, where a small network f changes what A reads from W; rank r.

f applies an activation, and then `depth` encoders and as many decoders with residual connections.
It is a function of the served weight alone, so the factors are computed once.
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
    Size,
    folded,
    measured,
    shape_of,
    states,
)
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import served

ACTIVATIONS = (
    "relu",
    "silu",
    "swish",
    "gelu",
    "gelu_pytorch_tanh",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "mish",
)
"""Names of activations as in transformers; the arithmetic gets a name's place in this list."""

MAX_DEPTH = 8
"""Most encoders. PEFT has no limit, and its examples go up to 2."""

_A, _B = "peanut_A.weight", "peanut_B.weight"
_ENCODERS = tuple(f"peanut_encoders.{n}.weight" for n in range(MAX_DEPTH))
_DECODERS = tuple(f"peanut_decoders.{n}.weight" for n in range(MAX_DEPTH))


@dataclass(frozen=True, slots=True)
class Networks:
    """PEANuT's matrices of each module.

    Attributes:
        depth: number of encoders, and of decoders.
        activation: place of the activation in `ACTIVATIONS`.
    """

    r: int
    depth: int
    activation: int
    scaling: float
    marks: Collection[str] = (_A, _B)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose matrices have the configured rank."""
        file.check_rank("r", self.r)
        inner = (*_ENCODERS[: self.depth], *_DECODERS[: self.depth])
        found = []
        for site in adapted:
            _, fan_out = shape_of(file, site)
            tensors = {role: file.require(site, role) for role in (_A, _B, *inner)}
            shapes: dict[str, tuple[Size, ...]] = dict.fromkeys(inner, ("r", "r"))
            shapes |= {_A: ("r", fan_out), _B: (fan_out, "r")}
            held = measured(file, site, tensors, shapes)
            file.check_scale(site, self.scaling, "scaling")
            if held is not None and states(file, site, held["r"], self.r, "r", "rank"):
                settings = {"depth": float(self.depth), "activation": float(self.activation)}
                scale = self.scaling
                found += folded(
                    file, site, "peanut", tensors, self.r, scale=scale, settings=settings
                )
        return found


def _read(reader: Reader) -> FoldedReading | None:
    rank, targets = reader.integer("r"), reader.targets()
    depth = reader.config.get("depth", 0)
    if type(depth) is not int or not 0 <= depth <= MAX_DEPTH:
        reader.unsupported("depth", f"is not an integer from 0 to {MAX_DEPTH}")
        return None
    places = {name: place for place, name in enumerate(ACTIVATIONS)}
    activation = reader.choice("act_fn", places, 0)
    scaling = reader.number("scaling", 1.0)
    if rank is None or scaling is None:
        return None
    return FoldedReading(targets, Networks(rank, depth, activation, scaling))


PEANUT = Kind(
    peft_type="PEANUT",
    summary="PEANuT: factors that a small network computes from the base's weights",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        "act_fn": served(", ".join(ACTIVATIONS)),
        "depth": served(f"up to {MAX_DEPTH}"),
        "r": served("uses the served weight"),
        "scaling": served(),
    },
    endings={**dict.fromkeys((_A, _B, *_ENCODERS, *_DECODERS), ""), **ENDINGS},
    read=_read,
)
