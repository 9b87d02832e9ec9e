"""Ratios between programs, by case and by round, and the line of figures that they add up to.

A ratio is formed between runs of one round, which follow each other within seconds, because the
speed of a machine changes within minutes. The figure is the median over the rounds, and its spread
the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OURS = "loraplex"

Rates = Mapping[str, Mapping[str, Sequence[float]]]
"""`rates[case][program]`: output tokens per second of each round."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of several figures; all nan if there are none."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(*[float("nan")] * 3)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def over(first: Sequence[float], second: Sequence[float]) -> Spread:
    """`first` over `second`, round by round."""
    return Spread.of([a / b for a, b in zip(first, second, strict=True)])


def peers_of(rates: Rates, case: str) -> list[str]:
    return [program for program in rates.get(case, {}) if program != OURS]


def over_best(rates: Rates, case: str) -> Spread:
    """Ours over the fastest other program of each round; nan without another one."""
    peers = peers_of(rates, case)
    if not peers or OURS not in rates[case]:
        return Spread.of([])
    best = [max(rounds) for rounds in zip(*(rates[case][p] for p in peers), strict=True)]
    return over(rates[case][OURS], best)


def between(rates: Rates, first: str, second: str) -> Spread:
    """Our throughput of one case over that of another."""
    if not all(OURS in rates.get(case, {}) for case in (first, second)):
        return Spread.of([])
    return over(rates[first][OURS], rates[second][OURS])


def one_row(rates: Rates, peer: str) -> Spread:
    """The smaller ratio of one row with and without an adapter; nan unless both were measured."""
    found = []
    for case in ("base_1", "adapter_1"):
        if not {OURS, peer} <= rates.get(case, {}).keys():
            return Spread.of([])
        found.append(over(rates[case][OURS], rates[case][peer]))
    return min(found, key=lambda spread: spread.median)


def summary(rates: Rates) -> dict[str, float]:
    """The figures that a run is judged by; nan where their cases were not measured."""
    return {
        "ratio_best_peer_distinct16": over_best(rates, "distinct_16").median,
        "ratio_best_peer_base16": over_best(rates, "base_16").median,
        "ratio_base": between(rates, "distinct_16", "base_16").median,
        "one_row_vs_llama_cpp": one_row(rates, "llama.cpp").median,
        "active64_ratio": between(rates, "distinct_64", "base_64").median,
    }
