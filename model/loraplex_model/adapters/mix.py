"""Adapters on mixed rows, in torch: rows with the same mix are computed together.

Each function takes the base's result for all rows and changes the rows of each group as the group's
adapters say; other rows belong to the bare base and stay as they are. The formulas are those of
`loraplex_model.adapters.delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from loraplex_model.adapters.delta import (
    Activation,
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    Reads,
    RowsDelta,
)
from loraplex_model.adapters.table import DenseMatrices, SlotTable
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.config import FUSED, MODEL, PROJECTIONS, Site
from loraplex_model.ops import autograd
from loraplex_model.ops.linear import TILE, by_tiles

Product = Callable[[torch.Tensor], torch.Tensor]
"""The base's product of a fused matrix with rows, bias included: [n, in] -> [n, out]."""

_Delta = TypeVar("_Delta", ProjectionDelta, RowsDelta, NormDelta, BottleneckDelta)

_ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: torch.relu,
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU: torch.nn.functional.gelu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: torch.nn.functional.leaky_relu,
}


@dataclass(frozen=True, slots=True)
class Dropout:
    """Inverted dropout of the inputs of A, with a mask of its own at each module, as in PEFT.

    A mask depends on `seed` and the site alone. So a layer that is computed again drops the same
    numbers, and a job drops the same ones whatever other jobs share its pass.

    Attributes:
        joined: as in `DecoderConfig`; parts of one module read the same input.
    """

    probability: float
    seed: int
    joined: tuple[str, ...] = ()

    def mask(self, site: Site, like: torch.Tensor) -> torch.Tensor:
        """Mask of the inputs that are kept: bool, with the shape of `like`."""
        layer, name = site
        name = next((FUSED[fused][0] for fused in self.joined if name in FUSED[fused]), name)
        generator = torch.Generator(like.device)
        generator.manual_seed(self.seed + layer * len(PROJECTIONS) + PROJECTIONS.index(name))
        random = torch.rand(like.shape, generator=generator, device=like.device)
        return random >= self.probability


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows with the same mix.

    Attributes:
        rows: int64 [n].
        adapters: the mix: adapters and their weights.
        dense: dense matrices that replace the projections of the base and of the only adapter.
        span: in training the slice that `rows` are; the mix is then one adapter with weight 1.
        dropout: in training the dropout of the adapter.
    """

    rows: torch.Tensor
    adapters: tuple[tuple[AdapterDelta, float], ...]
    dense: DenseMatrices | None = None
    span: slice | None = None
    dropout: Dropout | None = None

    def at(self, site: Site, kind: type[_Delta]) -> Iterator[tuple[_Delta, float]]:
        """The adapters' changes at a site, whose type is `kind`, each with its weight."""
        for adapter, weight in self.adapters:
            found = adapter.at(site, kind)
            if found is not None:
                yield found, weight


def groups_of(
    batch: ForwardBatch, table: SlotTable, sequences: Iterable[int], device: torch.device
) -> list[RowGroup]:
    """Groups the rows of a pass by mix; rows of the bare base are in no group.

    `sequences` is the sequence of each row.
    """
    mixes = [_mix(batch, s) for s in range(len(batch.context_lens))]
    by_mix: dict[Mix, list[int]] = {}
    for row, s in enumerate(sequences):
        if mixes[s]:
            by_mix.setdefault(mixes[s], []).append(row)
    return [
        RowGroup(
            torch.tensor(rows, device=device),
            tuple((table.delta(slot), weight) for slot, weight in mix),
            table.dense(mix),
        )
        for mix, rows in by_mix.items()
    ]


def embedded(
    tokens: torch.Tensor, embed: torch.Tensor, dtype: torch.dtype, groups: Sequence[RowGroup]
) -> torch.Tensor:
    """Embeddings [T, hidden] of `tokens` [T], in `dtype`, with the groups' changes.

    Ids from `len(embed)` on are virtual tokens of their group's only adapter.
    """
    tokens = tokens.long()
    x = embed[tokens.clamp(max=len(embed) - 1)].to(dtype)
    for group in groups:
        mine = tokens[group.rows]
        real = mine < len(embed)
        for delta, weight in group.at((MODEL, "embed_tokens"), RowsDelta):
            rows, ids = group.rows[real], mine[real]
            if delta.factors is not None:
                a, b = delta.factors
                change = by_tiles(a[ids].to(dtype), b.T.to(dtype))  # [ids, hidden]
                x = x.index_add(0, rows, change * weight)
            if delta.changed_rows is not None:
                token_ids, differences = delta.changed_rows
                at = torch.searchsorted(token_ids, ids.int()).clamp(max=len(differences) - 1)
                changed = token_ids[at] == ids
                own = differences[at[changed]].to(dtype) * weight
                x = x.index_add(0, rows[changed], own)
        virtual = group.adapters[0][0].virtual
        if virtual is not None and virtual.embeddings is not None and not bool(real.all()):
            own = virtual.embeddings[mine[~real] - len(embed)].to(dtype)
            x = x.index_copy(0, group.rows[~real], own)
    return x


def project(
    product: Product,
    x: torch.Tensor,
    layer: int,
    fused: str,
    modules: Sequence[tuple[str, int]],
    groups: Sequence[RowGroup],
) -> torch.Tensor:
    """One fused matrix with the groups' changes: x [T, in] -> [T, sum of widths].

    `modules` are the `(name, width)` of the projections whose outputs lie side by side.
    """
    y = product(x)
    for group in groups:
        dense = group.dense.get((layer, fused)) if group.dense is not None else None
        if dense is not None:
            own = by_tiles(x[group.rows], dense.weight.to(x.dtype))  # [rows, out]
            if dense.bias is not None:
                own = own + dense.bias.to(x.dtype)
            y.index_copy_(0, group.rows, own)
            continue
        start = 0
        for name, width in modules:
            columns = y[:, start : start + width]  # [T, width], a view
            changes = list(group.at((layer, name), ProjectionDelta))
            if changes:
                part = partial(_columns, product, start, start + width)
                _project_part(columns, x, changes, group.rows, part)
            start += width
    return y


def _columns(product: Product, start: int, end: int, x: torch.Tensor) -> torch.Tensor:
    return product(x)[:, start:end]


def _project_part(
    y: torch.Tensor,
    x: torch.Tensor,
    changes: Sequence[tuple[ProjectionDelta, float]],
    rows: torch.Tensor,
    product: Product,
) -> None:
    gain = blend([(change.in_gain, weight) for change, weight in changes])
    if gain is not None:
        y.index_copy_(0, rows, product(x[rows] * gain.to(x.dtype)))
    gain = blend([(change.gain, weight) for change, weight in changes])
    if gain is not None:
        y.index_copy_(0, rows, y[rows] * gain.to(y.dtype))
    for change, weight in changes:
        if change.factors is not None:
            a, b = (factor.to(x.dtype) for factor in change.factors)
            inner = by_tiles(x[rows], a)  # [rows, r]
            y.index_add_(0, rows, by_tiles(inner, b.T) * weight)
        if change.bias is not None:
            y.index_add_(0, rows, (change.bias.to(y.dtype) * weight).expand(len(rows), -1))


def add_to_expert(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    site: Site,
    expert: tuple[int, int],
    groups: Sequence[RowGroup],
) -> None:
    """Adds the groups' changes of one expert's projection to y [n, out], in place.

    Args:
        x: [n, in], the expert's inputs.
        rows: int64 [n], the rows of the pass that they are.
        expert: the expert's number, and the number of experts; the adapters' factors are [experts *
            rank, in] and [experts * rank, out].
    """
    number, count = expert
    for group in groups:
        own = torch.isin(rows, group.rows).nonzero().flatten()
        for change, weight in group.at(site, ProjectionDelta) if len(own) else ():
            assert change.factors is not None
            a, b = (each.chunk(count)[number].to(x.dtype) for each in change.factors)
            y.index_add_(0, own, by_tiles(by_tiles(x[own], a), b.T) * weight)


def blend(gains: Sequence[tuple[torch.Tensor | None, float]]) -> torch.Tensor | None:
    """`1 + sum w (gain - 1)`, or None if there are no gains. A single gain at weight 1 is exact."""
    present = [(gain, weight) for gain, weight in gains if gain is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][1] == 1.0:
        return present[0][0]
    return 1 + torch.stack([(gain - 1) * weight for gain, weight in present]).sum(0)


def norm_weights(
    site: Site, weight: torch.Tensor, bias: torch.Tensor | None, groups: Sequence[RowGroup]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Rows and the norm's weight and bias [width] of each group that changes the norm."""
    for group in groups:
        changes = list(group.at(site, NormDelta))
        if changes:
            yield group.rows, *changed_norm(weight, bias, changes)


def changed_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, changes: Sequence[tuple[NormDelta, float]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A norm's weight and bias with weighted changes added; float32 if it changes."""
    weights = [change.weight * factor for change, factor in changes if change.weight is not None]
    biases = [change.bias * factor for change, factor in changes if change.bias is not None]
    if weights:
        weight = autograd.wide(weight) + sum(weights)
    if biases:
        assert bias is not None, "the base's norm has no bias"
        bias = autograd.wide(bias) + sum(biases)
    return weight, bias


def add_bottlenecks(
    added: torch.Tensor,
    stream: torch.Tensor,
    normed: torch.Tensor,
    site: Site,
    groups: Sequence[RowGroup],
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """A block's output with the outputs of the groups' bottlenecks after that block added to it.

    `added` is the block's output, `stream` the residual stream before `residual_scale` times the
    output is added to it, and `normed` the block's input; all are [T, hidden].
    """
    result = added
    for group in groups:
        for change, weight in group.at(site, BottleneckDelta):
            read = {
                Reads.NORMED: normed,
                Reads.OUTPUT: added,
                Reads.STREAM: stream + added * residual_scale,
                Reads.INCOMING: stream,
            }[change.reads][group.rows]
            own = bottleneck(change, read.to(normed.dtype)) * weight
            result = result.index_add(0, group.rows, own.to(result.dtype))
    return result


def bottleneck(change: BottleneckDelta, read: torch.Tensor) -> torch.Tensor:
    """The output of a bottleneck, [n, hidden], for its inputs `read` [n, hidden]."""
    inner = by_tiles(read, change.down.to(read.dtype))  # [n, width]
    if change.down_bias is not None:
        inner = inner + change.down_bias.to(read.dtype)
    up = by_tiles(_activated(inner, change.activation), change.up.T.to(read.dtype))
    if change.up_bias is not None:
        up = up + change.up_bias.to(read.dtype)
    return up


def _activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    # Padded to whole vectors, since torch computes the rest of a row with other instructions.
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE))
    return _ACTIVATIONS[activation](padded)[:, : x.shape[1]]


def add_head(
    scores: torch.Tensor, hidden: torch.Tensor, groups: Sequence[RowGroup]
) -> torch.Tensor:
    """Logits with the groups' changes of the head.

    `scores` are the base's, [R, vocab], float32 (or float64); `hidden` is [R, hidden], and the
    groups' rows are indices into it.
    """
    for group in groups:
        for change, weight in group.at((MODEL, "lm_head"), RowsDelta):
            x = hidden[group.rows]
            if change.factors is not None:
                a, b = (factor.to(x.dtype) for factor in change.factors)
                own = by_tiles(by_tiles(x, a), b.T)  # [rows, vocab]
                scores = scores.index_add(0, group.rows, autograd.wide(own) * weight)
            if change.changed_rows is not None:
                token_ids, rows = change.changed_rows
                own = autograd.wide(by_tiles(x, rows.to(x.dtype))) * weight  # [rows, n]
                at = (group.rows[:, None], token_ids[None, :].long())
                scores = scores.index_put(at, own, accumulate=True)
    return scores


def _mix(batch: ForwardBatch, sequence: int) -> Mix:
    span = slice(int(batch.mix_starts[sequence]), int(batch.mix_starts[sequence + 1]))
    slots, weights = batch.mix_slots[span].tolist(), batch.mix_weights[span].tolist()
    return tuple(zip(slots, weights, strict=True))
