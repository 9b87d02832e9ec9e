"""Rank and scale of each module by `r`, `alpha`, `rank_pattern` and `alpha_pattern` (LyCORIS)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loraplex_model.base.config import Site

from loraplex_adapters.format.placement import Placement
from loraplex_adapters.format.reader import Reader


@dataclass(frozen=True, slots=True)
class Rank:
    """A module's rank before folding, the field that states it, and its scale, alpha / rank."""

    rank: int
    field: str
    scale: float


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a configuration; the patterns are by plain module name or expression."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def of(self, file: Placement, sites: Collection[Site]) -> Mapping[Site, Rank]:
        """The rank of each site; adds a finding for a scale that is too large."""
        ranks = file.matched("rank_pattern", self.rank_pattern, sites)
        alphas = file.matched("alpha_pattern", self.alpha_pattern, sites)
        found = {}
        for site in sites:
            rank = ranks.get(site, self.r)
            scale = alphas.get(site, self.alpha) / rank
            file.check_scale(site, scale, "alpha_pattern" if site in alphas else "alpha")
            found[site] = Rank(rank, "rank_pattern" if site in ranks else "r", scale)
        return found


def read_ranks(reader: Reader) -> Ranks | None:
    """Reads the four keys; None, with a finding, if `r` or `alpha` is wrong."""
    rank, alpha = reader.integer("r"), reader.number("alpha")
    rank_pattern = reader.pattern("rank_pattern", reader.as_integer)
    alpha_pattern = reader.pattern("alpha_pattern", reader.as_number)
    if rank is None or alpha is None:
        return None
    return Ranks(rank, alpha, rank_pattern, alpha_pattern)
