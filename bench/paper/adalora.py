"""AdaLoRA's distribution of ranks (arXiv 2303.10512): make bench-paper

An adapter of all seven projections starts with rank `INIT` everywhere and is cut to rank `TARGET`
per module on average, with all modules competing. Two more adapters train in the same passes: a
twin with the same start that is not cut, and a LoRA of rank `TARGET` everywhere. The benchmark
asserts that the ranks in AdaLoRA's file add up to the budget, and that AdaLoRA keeps most rank
where its *twin* needs it most: each module's change is removed from the twin in turn, and the loss
is measured again. So AdaLoRA's measure of importance is compared with an independent one.

The final losses are printed but not asserted: AdaLoRA is not better with all settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from loraplex_adapters.format.modules import PREFIX, module_path
from loraplex_model.adapters.delta import AdapterDelta, SiteDelta
from loraplex_model.base.config import PROJECTIONS, Site
from loraplex_training.methods.base import TrainedAdapter
from paper import small_model, sweeps
from paper.conclusion import conclude
from paper.sweeps import Job, Sweep
from report import table

INIT, TARGET = 8, 3
SEEDS = (0, 1)
RATE = 1e-2


def ranks(adapter: TrainedAdapter, layers: int) -> dict[Site, int]:
    """Remaining rank of every module, read from the tensors that would be saved."""
    tensors = adapter.files().tensors
    sites = [(layer, name) for layer in range(layers) for name in PROJECTIONS]
    paths = {site: module_path("LlamaForCausalLM", *site) for site in sites}
    return {site: len(tensors[f"{PREFIX}{path}.lora_E"]) for site, path in paths.items()}


def growth(sweep: Sweep, adapter: TrainedAdapter) -> dict[Site, float]:
    """Increase of the loss, in nats, when the change of each module is removed."""
    whole = adapter.delta().sites

    def loss(sites: Mapping[Site, SiteDelta]) -> float:
        return sweeps.loss_of(sweep, AdapterDelta(sites), pieces=64, seed=2)

    full = loss(whole)
    return {out: loss({s: d for s, d in whole.items() if s != out}) - full for out in whole}


def thirds(ranks: Mapping[Site, int], growth: Mapping[Site, float]) -> tuple[float, float]:
    """Mean growth of the third of the modules that kept least rank, and of that which kept most."""
    order = sorted(ranks, key=lambda site: (ranks[site], site))
    count = len(order) // 3
    least, most = order[:count], order[-count:]
    return sum(growth[s] for s in least) / count, sum(growth[s] for s in most) / count


def main() -> int:
    """Prints the ranks, the relations and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=160)
    steps = parser.parse_args().steps
    base = small_model.base()
    layers = base.config.num_layers
    sweep = Sweep(base, small_model.cpp_text(), steps, RATE)
    linear = {"target_modules": "all-linear"}
    kinds = {
        "adalora": ("adalora", {"init_r": INIT, "target_r": TARGET}),
        "twin": ("adalora", {"init_r": INIT, "target_r": INIT}),
        "lora": ("lora", {"r": TARGET}),
    }
    jobs = [
        Job(f"{name}, seed {seed}", {**linear, **options}, method, seed)
        for name, (method, options) in kinds.items()
        for seed in SEEDS
    ]
    trained = sweeps.train(sweep, jobs)
    count = len(SEEDS)
    found = [ranks(one.adapter, layers) for one in trained[:count]]
    grown = [growth(sweep, one.adapter) for one in trained[count : 2 * count]]
    both = [thirds(kept, more) for kept, more in zip(found, grown, strict=True)]
    _print(found, both)
    before, budget = sweeps.loss_of(sweep, None), TARGET * layers * len(PROJECTIONS)
    losses = {"base": before, **{one.job.name: one.loss for one in trained}}
    print(table(["adapter", "loss, nats a byte"], list(losses.items())))
    relations = {
        "the ranks that are saved add up to the budget": all(
            sum(kept.values()) == budget for kept in found
        ),
        "they differ between modules": all(len(set(kept.values())) > 2 for kept in found),
        "the twin needs the modules of most rank at least twice as much as those of least": all(
            most > 2 * max(least, 0.0) for least, most in both
        ),
        "every adapter ends below the base's loss": all(one.loss < before for one in trained),
    }
    values = {
        "budget": budget,
        "ranks": [_grid(kept) for kept in found],
        "growth": [_grid(more) for more in grown],
        "growth_least_and_most": both,
        "loss": losses,
    }
    return conclude("adalora", values, relations)


def _grid(values: Mapping[Site, float]) -> list[list[float]]:
    """The values as a table [layers][projections]."""
    layers = range(1 + max(layer for layer, _ in values))
    return [[values[layer, name] for name in PROJECTIONS] for layer in layers]


def _print(found: Sequence[Mapping[Site, int]], both: Sequence[tuple[float, float]]) -> None:
    for seed, kept in zip(SEEDS, found, strict=True):
        rows = [[layer, *row] for layer, row in enumerate(_grid(kept))]
        print(table([f"rank kept, seed {seed}", *PROJECTIONS], rows), end="\n\n")
    head = ["the twin's loss without a module", "of the third of least rank", "of most rank"]
    rows = [[f"grows, seed {seed}", *two] for seed, two in zip(SEEDS, both, strict=True)]
    print(table(head, rows), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
