"""LoRA on mixed rows, in torch: rows that share a mix are computed together.

y[rows, columns of the module] += weight * B (A x[rows]), for every adapter of the mix
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from loraplex_model.adapter import AdapterTable, LoraFactors
from loraplex_model.batch import ForwardBatch, Mix
from loraplex_model.config import PROJECTIONS, DecoderConfig
from loraplex_model.linear import by_tiles

Factors = Callable[[int, str], tuple[torch.Tensor, torch.Tensor] | None]
"""`(layer, module name)` to `(A [r, in], B transposed [r, out], scale folded in)`, or None."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows (int64 [n]) and the adapters they share, each with its weight."""

    rows: torch.Tensor
    adapters: tuple[tuple[Factors, float], ...]


def add_deltas(
    y: torch.Tensor,
    x: torch.Tensor,
    layer: int,
    modules: Iterable[tuple[str, int]],
    groups: Sequence[RowGroup],
) -> None:
    """Adds every group's deltas to `y` [T, sum of widths], in place.

    `modules` are the `(name, width)` whose outputs lie side by side in `y`; all read `x` [T, in].
    """
    start = 0
    for module, width in modules:
        columns = y[:, start : start + width]
        for group in groups:
            for factors, weight in group.adapters:
                found = factors(layer, module)
                if found is not None:
                    a, b = (factor.to(x.dtype) for factor in found)
                    delta = by_tiles(by_tiles(x[group.rows], a), b.T)
                    columns.index_add_(0, group.rows, delta * weight)
        start += width


def resident(table: AdapterTable, slot: int, config: DecoderConfig) -> Factors:
    """The factors of the adapter in `slot`, as views of its packed tensor."""
    adapter = table.adapters[slot]
    assert adapter is not None, f"slot {slot} is empty"
    shapes = config.projection_shapes()

    def factors(layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return adapter.factors(layer, PROJECTIONS.index(module), shapes[module])

    return factors


def trainable(modules: dict[tuple[int, str], LoraFactors]) -> Factors:
    """Factors whose gradients flow to `a` and `b` of the given ones."""

    def factors(layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        lora = modules.get((layer, module))
        return None if lora is None else (lora.a, lora.b.T * lora.scale)

    return factors


def groups_of(
    batch: ForwardBatch, table: AdapterTable, config: DecoderConfig, device: torch.device
) -> list[RowGroup]:
    """The batch's rows by mix; rows of the bare base are in no group."""
    by_mix: dict[Mix, list[int]] = {}
    for s in range(len(batch.context_lens)):
        span = slice(int(batch.mix_starts[s]), int(batch.mix_starts[s + 1]))
        slots, weights = batch.mix_slots[span].tolist(), batch.mix_weights[span].tolist()
        mix = tuple(zip(slots, weights, strict=True))
        rows = range(int(batch.query_starts[s]), int(batch.query_starts[s + 1]))
        if mix:
            by_mix.setdefault(mix, []).extend(rows)
    return [
        RowGroup(
            torch.tensor(rows, device=device),
            tuple((resident(table, slot, config), weight) for slot, weight in mix),
        )
        for mix, rows in by_mix.items()
    ]
