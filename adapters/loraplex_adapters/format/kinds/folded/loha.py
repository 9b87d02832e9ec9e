"""LOHA: y += alpha / r * ((w1_a w1_b) * (w2_a w2_b)) x, of folded rank r * r."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex_model.base.config import Site

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
from loraplex_adapters.format.kinds.folded.patterns import Ranks, read_ranks
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served

_ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, slots=True)
class HadamardProducts:
    """LoHa's four factors of each module."""

    ranks: Ranks
    marks: Collection[str] = _ROLES

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose factors have the configured rank."""
        found = []
        for site, rank in self.ranks.of(file, adapted).items():
            fan_in, fan_out = shape_of(file, site)
            tensors = {role: file.require(site, role) for role in _ROLES}
            shapes: dict[str, tuple[Size, ...]] = {
                role: (fan_out, "r") if role.endswith("a") else ("r", fan_in) for role in _ROLES
            }
            held = measured(file, site, tensors, shapes)
            if held is not None and states(file, site, held["r"], rank.rank, rank.field, "rank"):
                parts = f"{rank.rank} x {rank.rank}"
                columns = rank.rank * rank.rank
                found += folded(file, site, "loha", tensors, columns, parts, scale=rank.scale)
        return found


def _read(reader: Reader) -> FoldedReading | None:
    ranks = read_ranks(reader)
    targets = reader.targets()
    return None if ranks is None else FoldedReading(targets, HadamardProducts(ranks))


LOHA = Kind(
    peft_type="LOHA",
    summary="LoHa: Hadamard products of low-rank factors",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        **PATTERN_OPTIONS,
        "alpha": served(),
        "module_dropout": DROPOUT,
        "r": served("folded rank r * r"),
        "rank_dropout": DROPOUT,
        "use_effective_conv2d": ignored("changes convolutions only"),
    },
    endings={**dict.fromkeys(_ROLES, ""), **ENDINGS},
    read=_read,
)
