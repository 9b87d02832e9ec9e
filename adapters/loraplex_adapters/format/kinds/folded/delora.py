"""DELORA: y += lambda / r * sum over i of b_i (a_i . (w_norm * x)) / (|a_i| |b_i|), rank r.

`w_norm` are the norms of the columns of the weight that was trained on. PEFT saves them, and uses
the saved ones on whatever base it loads the adapter into; so does this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

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
    read_bias,
    shape_of,
    states,
)
from loraplex_adapters.format.kinds.whole import BIAS_ENDINGS
from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.format.support import ignored, served

_ROLES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")


@dataclass(frozen=True, slots=True)
class NormalisedFactors:
    """DeLoRA's tensors of each module; `rank_pattern` is by module name or expression."""

    r: int
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    marks: Collection[str] = _ROLES

    def modules(self, file: Placement, adapted: list[Site]) -> list[ModuleSpec]:
        """The modules whose factors have the configured rank."""
        file.check_rank("r", self.r)
        ranks = file.matched("rank_pattern", self.rank_pattern, adapted)
        found = []
        for site in adapted:
            fan_in, fan_out = shape_of(file, site)
            tensors = {role: file.require(site, role) for role in _ROLES}
            shapes: list[tuple[Size, ...]] = [("r", fan_in), (fan_out, "r"), (1,), (fan_in,)]
            held = measured(file, site, tensors, dict(zip(_ROLES, shapes, strict=True)))
            rank, key = ranks.get(site, self.r), "rank_pattern" if site in ranks else "r"
            if held is not None and states(file, site, held["r"], rank, key, "rank"):
                found += folded(file, site, "delora", tensors, rank)
        return found


def _read(reader: Reader) -> FoldedReading | None:
    rank, targets = reader.integer("r"), reader.targets()
    rank_pattern = reader.pattern("rank_pattern", reader.as_integer)
    bias = read_bias(reader, "delora_only")
    if rank is None:
        return None
    return FoldedReading(targets, NormalisedFactors(rank, rank_pattern), bias)


DELORA = Kind(
    peft_type="DELORA",
    summary="DeLoRA: LoRA whose directions and strength are apart",
    options={
        **TARGET_OPTIONS,
        **EXCLUDED_OPTION,
        "bias": served("none, all, delora_only"),
        "delora_lambda": ignored("an initial value; the tensors have the trained one"),
        "lambda_pattern": ignored("initial values; the tensors have the trained ones"),
        "module_dropout": DROPOUT,
        "r": served(),
        "rank_pattern": PATTERN_OPTIONS["rank_pattern"],
    },
    endings={**dict.fromkeys(_ROLES, ""), **BIAS_ENDINGS, **ENDINGS},
    read=_read,
)
