"""LOKR: y += alpha / r * kron(w1, w2) x, where w1 and w2 are matrices or products of two."""

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
    PATTERN_OPTIONS,
    TARGET_OPTIONS,
    FoldedReading,
    Size,
    folded,
    measured,
    shape_of,
    states,
)
from loraplex_adapters.format.kinds.folded.patterns import Rank, Ranks, read_ranks
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec, TensorLocation
from loraplex_adapters.format.strict_json import shown
from loraplex_adapters.format.support import ignored, served

_WHOLE = ("lokr_w1", "lokr_w2")
_ROLES = (*_WHOLE, *(f"{role}_{side}" for role in _WHOLE for side in "ab"))
_SHAPES_DECIDE = ignored("the tensors' shapes decide")


@dataclass(frozen=True, slots=True)
class _Half:
    """w1 or w2 of a module: its tensors by role, height, width, and rank by its shape."""

    tensors: dict[str, TensorLocation | None]
    height: int
    width: int
    rank: int


@dataclass(frozen=True, slots=True)
class KroneckerProducts:
    """LoKr's two matrices of each module."""

    ranks: Ranks
    marks: Collection[str] = _ROLES

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose Kronecker product has the shape of the base's matrix."""
        found = []
        for site, rank in self.ranks.of(file, adapted).items():
            halves = [self._half(file, site, role, rank) for role in _WHOLE]
            found += self._product(file, site, halves, rank)
        return found

    def _half(self, file: Placement, site: Site, role: str, rank: Rank) -> _Half | None:
        """Claims w1 or w2. PEFT chooses the form by the rank; here the file's tensors do."""
        shapes: dict[str, tuple[Size, ...]] = {role: ("height", "width")}
        tensors = {role: file.claim(site, role)}
        if tensors[role] is None:
            shapes = {f"{role}_a": ("height", "rank"), f"{role}_b": ("rank", "width")}
            tensors = {each: file.require(site, each) for each in shapes}
        held = measured(file, site, tensors, shapes)
        if held is None:
            return None
        inner = held.get("rank", rank.rank)
        if not states(file, site, inner, rank.rank, rank.field, "rank"):
            return None
        least = min(held["height"], held["width"])
        least = min(least, inner) if "rank" in held else least
        return _Half(tensors, held["height"], held["width"], least)

    def _product(
        self, file: Placement, site: Site, halves: list[_Half | None], rank: Rank
    ) -> list[ModuleSpec]:
        first, second = halves
        if first is None or second is None:
            return []
        tensors = {**first.tensors, **second.tensors}
        width, height = shape_of(file, site)
        made = first.height * second.height, first.width * second.width
        if made != (height, width):
            name = next(shown(tensor.name) for tensor in tensors.values() if tensor is not None)
            message = f"{file.path(site)} has a Kronecker product of {made[0]} x {made[1]}; "
            message += f"the base's {site[1]} is {height} x {width}"
            file.find(Reason.BASE_MODEL_MISMATCH, message, name)
            return []
        parts = f"{first.rank} x {second.rank}"
        columns = first.rank * second.rank
        return folded(file, site, "lokr", tensors, columns, parts, scale=rank.scale)


def _read(reader: Reader) -> FoldedReading | None:
    ranks = read_ranks(reader)
    targets = reader.targets()
    return None if ranks is None else FoldedReading(targets, KroneckerProducts(ranks))


LOKR = Kind(
    peft_type="LOKR",
    summary="LoKr: Kronecker products",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        **PATTERN_OPTIONS,
        "alpha": served(),
        "decompose_both": _SHAPES_DECIDE,
        "decompose_factor": _SHAPES_DECIDE,
        "module_dropout": DROPOUT,
        "r": served("folded rank is that of w1 times that of w2"),
        "rank_dropout": DROPOUT,
        "rank_dropout_scale": DROPOUT,
        "use_effective_conv2d": ignored("changes convolutions only"),
    },
    endings={**dict.fromkeys(_ROLES, ""), **ENDINGS},
    read=_read,
)
