"""VERA, PVERA: y += diag(b) B diag(d) A x, with one A and one B for all modules.

PVERA trains a distribution: the first half of A and d gives means, the second half logarithms of
variances. The means are served, which is what PEFT computes unless it samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

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
from loraplex_adapters.format.support import Option, ignored, refused, served
from loraplex_adapters.format.targets import Targets

_SEEDS = range(-(1 << 63), 1 << 64)
"""Seeds that torch takes."""


@dataclass(frozen=True, slots=True)
class SharedFactors:
    """VeRA's vectors of each module, and the matrices that they share.

    Attributes:
        kind: "vera" or "pvera".
        seed: the seed of the shared matrices; None if they are in the file.
    """

    kind: str
    r: int
    targets: Targets
    seed: int | None

    @property
    def marks(self) -> Collection[str]:
        """The names of the vectors."""
        return _vectors(self.kind)

    @property
    def rows(self) -> int:
        """Rows of A, and elements of d."""
        return self.r * (2 if self.kind == "pvera" else 1)

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose vectors fit, if the shared matrices do."""
        file.check_rank("r", self.r)
        inputs, outputs = widest(file, self.targets)
        shared: dict[str, TensorLocation | None] = {}
        settings: dict[str, float] = {}
        fits = True
        if self.seed is None:
            names = _shared(self.kind)
            shared = {role: file.require(SHARED, name) for role, name in names.items()}
            sizes: list[tuple[Size, ...]] = [(self.rows, inputs), (outputs, self.r)]
            shapes = dict(zip(names, sizes, strict=True))
            owner = "by r and the widest target modules of this base it"
            fits = measured(file, SHARED, shared, shapes, owner) is not None
        else:
            settings = {"seed": self.seed, "r": self.r, "inputs": inputs, "outputs": outputs}
            settings["rows"] = self.rows
        found = []
        for site in adapted:
            b, d = _vectors(self.kind)
            tensors = {role: file.require(site, role) for role in (b, d)}
            widths: dict[str, tuple[Size, ...]] = {b: (shape_of(file, site)[1],), d: ("r",)}
            held = measured(file, site, tensors, widths)
            if held is None or not states(file, site, held["r"], self.rows, "r", "rank"):
                continue
            if fits and self.r <= file.limits.max_rank:
                every = {**tensors, **shared}
                found += folded(file, site, self.kind, every, self.r, settings=settings)
        return found


def _vectors(kind: str) -> tuple[str, str]:
    return f"{kind}_lambda_b", f"{kind}_lambda_d"


def _shared(kind: str) -> Mapping[str, str]:
    return {f"{kind}_{part}": f"base_model.{kind}_{part}" for part in "AB"}


def _read(reader: Reader, kind: str) -> FoldedReading | None:
    r, targets = reader.integer("r"), reader.targets()
    bias = read_bias(reader, f"{kind}_only")
    seed: int | None = None
    if "save_projection" in reader.config and not reader.flag("save_projection"):
        value = reader.config.get("projection_prng_key", 0)
        if type(value) is not int or value not in _SEEDS:
            reader.invalid("projection_prng_key", "is not a seed of at most 64 bits")
            return None
        seed = value
    if r is None:
        return None
    return FoldedReading(targets, SharedFactors(kind, r, targets, seed), bias)


_OPTIONS: Mapping[str, Option] = {
    **TARGET_OPTIONS,
    **TRANSPOSED_OPTION,
    "d_initial": ignored("initial values only"),
    "projection_prng_key": served("without save_projection, the factors are drawn again"),
    "r": served(),
    "save_projection": served(),
}


def _endings(kind: str) -> Mapping[str, str]:
    return {**dict.fromkeys(_vectors(kind), ""), **BIAS_ENDINGS, **ENDINGS}


VERA = Kind(
    peft_type="VERA",
    summary="VeRA: shared random factors",
    options={**_OPTIONS, "bias": served("none, all, vera_only"), "vera_dropout": DROPOUT},
    endings=_endings("vera"),
    shared=dict.fromkeys(_shared("vera").values(), "save_projection"),
    read=partial(_read, kind="vera"),
)

PVERA = Kind(
    peft_type="PVERA",
    summary="PVeRA: VeRA with trained means and variances, of which the means are served",
    options={
        **_OPTIONS,
        "bias": served("none, all, pvera_only"),
        "generator_seed": ignored("of sampling"),
        "pvera_dropout": DROPOUT,
        "sample_at_inference": refused("sampling a change for each call"),
    },
    endings=_endings("pvera"),
    shared=dict.fromkeys(_shared("pvera").values(), "save_projection"),
    read=partial(_read, kind="pvera"),
)
