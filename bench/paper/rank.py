"""The rank that LoRA needs, and its best place (arXiv 2106.09685, tables 5 and 6): make bench-paper

Three ablations on one NF4 base. All adapters train together: a pass computes the examples of all
jobs on the base at once.

Rank: r = 1, 2, 4, 8, 64 on Wq and Wv with a fixed alpha, on text that the base knows in another
form (Python in capitals) and on text that is new to it (C++). The change that r = 64 has learned is
also cut down to its best 1, 2, 4 and 8 directions per module, by its singular values: its intrinsic
rank.

Budget: the same number of parameters on Wq, Wk, Wv or Wo, on Wq and Wv, or on all four (C++).

Place: all seven projections and Wq and Wv, at one rank (QLoRA, arXiv 2305.14314, section 4).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_training.methods.base import TrainedAdapter
from paper import small_model, sweeps
from paper.conclusion import conclude
from paper.sweeps import Job, Sweep, Trained
from report import table

RANKS = (1, 2, 4, 8, 64)
ALPHA = 16
BUDGET: Mapping[str, tuple[str, int]] = {
    "q": ("q_proj", 8),
    "k": ("k_proj", 8),
    "v": ("v_proj", 8),
    "o": ("o_proj", 8),
    "qv": ("qv", 4),
    "qkvo": ("attention", 2),
}
"""Modules and rank; all have the same number of parameters, since the four are square."""
EVERYWHERE = "all-linear"
SEEDS = (0, 1)
RATE = 1e-2


def capitals() -> small_model.Text:
    """The training text of the base in capitals."""

    def upper(text: torch.Tensor) -> torch.Tensor:
        return torch.frombuffer(bytearray(text.numpy().tobytes().upper()), dtype=torch.uint8)

    known = small_model.python_text()
    return small_model.Text(upper(known.train), upper(known.evaluation))


def rank_jobs(seeds: Sequence[int]) -> list[Job]:
    """Jobs named by their rank."""
    return [
        Job(str(r), {"r": r, "lora_alpha": ALPHA, "target_modules": "qv"}, seed=seed)
        for seed in seeds
        for r in RANKS
    ]


def place_jobs(seeds: Sequence[int]) -> list[Job]:
    """Jobs named by their modules; alpha is twice the rank, so that all have the same scale."""
    places = {**BUDGET, EVERYWHERE: ("all-linear", 4)}
    return [
        Job(name, {"r": r, "lora_alpha": 2 * r, "target_modules": modules}, seed=seed)
        for seed in seeds
        for name, (modules, r) in places.items()
    ]


def cut(adapter: TrainedAdapter, rank: int) -> AdapterDelta:
    """The adapter's change with every B A replaced by the nearest matrix of the given rank."""
    sites = {}
    for site, change in adapter.delta().sites.items():
        assert isinstance(change, ProjectionDelta)
        assert change.factors is not None
        a, b = change.factors
        left, values, right = torch.linalg.svd(b.T @ a, full_matrices=False)
        b = (left[:, :rank] * values[:rank]).T
        sites[site] = ProjectionDelta(a=right[:rank], b=b)
    return AdapterDelta(sites)


def intrinsic(sweep: Sweep, before: float, trained: Sequence[Trained]) -> dict[str, list[float]]:
    """Gain of each seed's adapter of the largest r when cut down to a rank, by rank."""
    widest = [one.adapter for one in trained if one.job.name == str(RANKS[-1])]
    return {
        str(rank): [before - sweeps.loss_of(sweep, cut(one, rank)) for one in widest]
        for rank in RANKS
    }


def gains(before: float, trained: Sequence[Trained]) -> dict[str, list[float]]:
    """Decrease of the base's loss by each seed's job, in nats per byte, by name."""
    found: dict[str, list[float]] = {}
    for one in trained:
        found.setdefault(one.job.name, []).append(before - one.loss)
    return found


def main() -> int:
    """Prints the tables, the relations and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    seeds = SEEDS[: arguments.seeds]
    base = small_model.base()
    known = Sweep(base, capitals(), arguments.steps, RATE)
    new = Sweep(base, small_model.cpp_text(), arguments.steps, RATE)
    start = time.perf_counter()
    ranks = rank_jobs(seeds)
    both = sweeps.train(new, ranks + place_jobs(seeds))
    seen = sweeps.train(known, ranks)
    seconds = time.perf_counter() - start
    before_known, before_new = sweeps.loss_of(known, None), sweeps.loss_of(new, None)
    on_known, on_new = gains(before_known, seen), gains(before_new, both[: len(ranks)])
    directions = intrinsic(known, before_known, seen)
    places = gains(before_new, both[len(ranks) :])
    parameters = {one.job.name: one.parameters for one in both[len(ranks) :]}
    head = ["gain, nats a byte", "of each seed"]
    for title, found in (("r on Python in capitals", on_known), ("r on C++", on_new),
                         ("of r = 64 in capitals the best", directions),
                         ("place on C++", places)):  # fmt: skip
        rows = [[k, mean(v), ", ".join(f"{x:.3f}" for x in v)] for k, v in found.items()]
        print(table([title, *head], rows), end="\n\n")
    values = {
        "ranks": RANKS,
        "known": on_known,
        "new": on_new,
        "directions": directions,
        "places": places,
        "parameters": parameters,
        "seconds": seconds,
    }
    return conclude("rank", values, relations(on_known, on_new, directions, places, parameters))


def relations(
    known: Mapping[str, Sequence[float]],
    new: Mapping[str, Sequence[float]],
    directions: Mapping[str, Sequence[float]],
    places: Mapping[str, Sequence[float]],
    parameters: Mapping[str, int],
) -> dict[str, bool]:
    """The relations that are asserted of the gains by name and seed."""
    at = {name: mean(gain) for name, gain in places.items()}
    best = max(at[name] for name in BUDGET)

    def saturates(gain: Mapping[str, Sequence[float]]) -> bool:
        one, four, eight, most = (mean(gain[str(r)]) for r in (1, 4, 8, 64))
        return (four - one) / 2 > 1.2 * (most - eight) / 3

    return {
        "a doubling of r brings less from 8 to 64 than from 1 to 4, on both": saturates(known)
        and saturates(new),
        "on what the base knows, r = 1 gains at least half of what r = 64 does": mean(known["1"])
        > 0.5 * mean(known["64"]),
        "there, r = 8 gains at least 9/10 of it": mean(known["8"]) > 0.9 * mean(known["64"]),
        "on what is new, r = 8 gains at least 3/4 of what r = 64 does": mean(new["8"])
        > 0.75 * mean(new["64"]),
        "eight directions of r = 64 hold at least 9/10 of what it gains": mean(directions["8"])
        > 0.9 * mean(directions["64"]),
        "every budget is the same": len({parameters[name] for name in BUDGET}) == 1,
        "Wq or Wk alone gain less than 3/4 of Wv, Wo, qv or qkvo, with every seed": all(
            less < 0.75 * more
            for i in range(len(places["q"]))
            for less in (places["q"][i], places["k"][i])
            for more in (places[name][i] for name in ("v", "o", "qv", "qkvo"))
        ),
        "qkvo is the best use of the budget or within a sixth of it": at["qkvo"] > best * 5 / 6,
        "all seven projections gain more than Wq and Wv, with every seed": all(
            more > 1.1 * less for more, less in zip(places[EVERYWHERE], places["qv"], strict=True)
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
