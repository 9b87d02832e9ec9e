"""VERA: y += diag(b) B diag(d) A x, with one A and one B for all modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loraplex_model.base.config import Site

from loraplex_adapters.format.kinds.base import Kind
from loraplex_adapters.format.kinds.folded.base import (
    BIAS_ENDINGS,
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
from loraplex_adapters.format.modules import SHARED
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.support import ignored, served
from loraplex_adapters.format.targets import Targets

_SHARED = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_SEEDS = range(-(1 << 63), 1 << 64)
"""Seeds that torch takes."""


@dataclass(frozen=True, slots=True)
class SharedFactors:
    """VeRA's vectors of each module, and the matrices that they share.

    Attributes:
        seed: the seed of the shared matrices; None if they are in the file.
    """

    r: int
    targets: Targets
    seed: int | None
    marks: Collection[str] = _VECTORS

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose vectors fit, if the shared matrices do."""
        file.check_rank("r", self.r)
        inputs, outputs = widest(file, self.targets)
        shared: dict[str, TensorLocation | None] = {}
        settings: Mapping[str, float] = {}
        fits = True
        if self.seed is None:
            shared = {role: file.require(SHARED, name) for role, name in _SHARED.items()}
            shapes = {"vera_A": (self.r, inputs), "vera_B": (outputs, self.r)}
            owner = "by r and the widest target modules of this base it"
            fits = measured(file, SHARED, shared, shapes, owner) is not None
        else:
            settings = {"seed": self.seed, "r": self.r, "inputs": inputs, "outputs": outputs}
        found = []
        for site in adapted:
            tensors = {role: file.require(site, role) for role in _VECTORS}
            widths: dict[str, tuple[Size, ...]] = {
                "vera_lambda_b": (shape_of(file, site)[1],),
                "vera_lambda_d": ("r",),
            }
            held = measured(file, site, tensors, widths)
            if held is None or not states(file, site, held["r"], self.r, "r", "rank"):
                continue
            if fits and self.r <= file.limits.max_rank:
                found += folded(
                    file, site, "vera", {**tensors, **shared}, self.r, settings=settings
                )
        return found


def _read(reader: Reader) -> FoldedReading | None:
    r, targets = reader.integer("r"), reader.targets()
    bias = read_bias(reader, "vera_only")
    seed: int | None = None
    if "save_projection" in reader.config and not reader.flag("save_projection"):
        value = reader.config.get("projection_prng_key", 0)
        if type(value) is not int or value not in _SEEDS:
            reader.invalid("projection_prng_key", "is not a seed of at most 64 bits")
            return None
        seed = value
    if r is None:
        return None
    return FoldedReading(targets, SharedFactors(r, targets, seed), bias)


VERA = Kind(
    peft_type="VERA",
    summary="VeRA: shared random factors",
    options={
        **TARGET_OPTIONS,
        **TRANSPOSED_OPTION,
        "bias": served("none, all, vera_only"),
        "d_initial": ignored("initial values only"),
        "projection_prng_key": served("without save_projection, the factors are drawn again"),
        "r": served(),
        "save_projection": served(),
        "vera_dropout": DROPOUT,
    },
    endings={**dict.fromkeys(_VECTORS, ""), **BIAS_ENDINGS, **ENDINGS},
    shared=dict.fromkeys(_SHARED.values(), "save_projection"),
    read=_read,
)
