"""Counts the launches and waits of a decode step of the decoder on CUDA: make bench-gpu-launches

    TRITON_INTERPRET=1 python bench/gpu_launches.py

No GPU is needed: the decoder runs on the CPU in Triton's interpreter, where every launch of a
kernel and every operation of torch that would be one is counted. What a layer launches is the
difference between models of two layers and of one. The last line of output is one JSON object:
launches per layer for rows of the base, for rows that share one adapter and for 64 rows with 64
adapters, and how often the host waits for the device in a step. Exit code 1 if a layer launches
more than 18 times, if 64 adapters launch more than one does, or if the host waits more than once.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import report as output
import torch
from gpu import inputs
from gpu.launches import watched
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.decoder.cuda.decoder import CudaDecoder

MOST_LAUNCHES = 18
"""Launches of a layer, at most."""

ROWS = 64
RANK = 2
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Counted:
    """What one step did.

    Attributes:
        launches: how often each kernel and operation was launched.
        waits: times that the host waited for the device.
        copies: copies from and to the host.
    """

    launches: Counter[str]
    waits: int
    copies: tuple[int, int]


def count(layers: int, mixes: list[Mix]) -> Counted:
    """One decode step of a tiny model, with one row for each mix.

    A first step of one row, which also brings the adapters' addresses to the device, is not
    counted.
    """
    model = inputs.with_layers(
        inputs.config(
            hidden=64, intermediate=64, layers=2, heads=2, kv_heads=1, head_dim=32, vocab=128
        ),
        layers,
    )
    weights = inputs.random_weights(model, torch.float32, "cpu")
    decoder = CudaDecoder(weights, len(mixes), BLOCK, ROWS, max_positions=BLOCK)
    adapter = inputs.random_factors(inputs.adapter_of(model, RANK, torch.float32), "cpu", 0.1)
    for slot in sorted({slot for mix in mixes for slot, _ in mix}):
        decoder.table.publish(slot, adapter)
    batch = ForwardBatch.build([([3 + row], 0, [row], mix) for row, mix in enumerate(mixes)])
    decoder.forward(ForwardBatch.build([([3], 0, [0], ())]))
    transfers = decoder.transfers
    before = transfers.synchronisations, transfers.copies_in, transfers.copies_out
    with watched() as seen:
        decoder.forward(batch)
    waits = transfers.synchronisations - before[0] + len(seen.waits)
    copies = transfers.copies_in - before[1], transfers.copies_out - before[2]
    return Counted(Counter(seen.launches), waits, copies)


def per_layer(mixes: list[Mix]) -> tuple[Counter[str], Counted]:
    """Launches of one layer, and the counts of a step of two layers."""
    one, two = count(1, mixes), count(2, mixes)
    own = two.launches.copy()
    own.subtract(one.launches)
    return own, two


def main() -> int:
    """Prints the table and the JSON line; returns the exit code."""
    torch.manual_seed(0)
    cases: dict[str, list[Mix]] = {
        "base": [()] * 4,
        "one adapter": [((0, 1.0),)] * 4,
        "64 adapters": [((slot, 1.0),) for slot in range(ROWS)],
    }
    found = {name: per_layer(mixes) for name, mixes in cases.items()}
    names = sorted({name for own, _ in found.values() for name, n in own.items() if n})
    rows: list[list[object]] = [[name, *(own[name] for own, _ in found.values())] for name in names]
    print(output.table(["launches of a layer", *cases], rows))
    totals = {name: sum(own.values()) for name, (own, _) in found.items()}
    waits = {step.waits for _, step in found.values()}
    figures = {
        "launches_per_layer_base": totals["base"],
        "launches_per_layer": totals["one adapter"],
        "launches_per_layer_64_adapters": totals["64 adapters"],
        "launches_per_step": sum(found["64 adapters"][1].launches.values()),
        "copies_per_step": list(found["64 adapters"][1].copies),
        "syncs_per_step": max(waits),
    }
    print(output.json_line(figures))
    too_many = max(totals.values()) > MOST_LAUNCHES or totals["64 adapters"] > totals["one adapter"]
    return int(max(waits) > 1 or too_many)


if __name__ == "__main__":
    sys.exit(main())
