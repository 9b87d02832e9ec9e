"""Adapters on mixed rows, in torch: rows that share a mix are computed together.

Every function takes what the base gives for all rows, and returns (or writes) what the groups' rows
are with their adapters. Rows in no group are the base's own and are not touched. The formulas are
those of `loraplex_model.adapters.delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from loraplex_model.adapters.delta import Activation, Reads, SiteDelta, VirtualTokens
from loraplex_model.adapters.table import AdapterTable, DenseMatrices
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.config import MODEL, PROJECTIONS, Site
from loraplex_model.ops import autograd
from loraplex_model.ops.linear import TILE, by_tiles

Product = Callable[[torch.Tensor], torch.Tensor]
"""The base's product of a fused matrix with rows, bias included: [n, in] -> [n, out]."""

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


class Adapter(Protocol):
    """What is known of an adapter: `AdapterDelta` has it, packed or in training."""

    @property
    def virtual(self) -> VirtualTokens | None: ...
    def at(self, site: Site) -> SiteDelta | None: ...


@dataclass(frozen=True, slots=True)
class Dropout:
    """What is dropped of the inputs of A: inverted dropout, for each module anew, as PEFT does.

    A mask is a function of `seed` and the site alone, so a layer that is computed again drops the
    same numbers, and a job drops the same ones whatever shares its pass.
    """

    probability: float
    seed: int

    def mask(self, site: Site, like: torch.Tensor) -> torch.Tensor:
        """bool, of the shape of `like`: what stays."""
        layer, name = site
        generator = torch.Generator(like.device)
        generator.manual_seed(self.seed + layer * len(PROJECTIONS) + PROJECTIONS.index(name))
        random = torch.rand(like.shape, generator=generator, device=like.device)
        return random >= self.probability


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows (int64 [n]) and the adapters they share, each with its weight.

    `dense`, where it is given, stands for the projections of the base and of the one adapter.
    `span` is given in training, where `rows` are those of a slice and `adapters` one at weight 1;
    `dropout` is of its inputs of A.
    """

    rows: torch.Tensor
    adapters: tuple[tuple[Adapter, float], ...]
    dense: DenseMatrices | None = None
    span: slice | None = None
    dropout: Dropout | None = None

    def at(self, site: Site) -> Iterator[tuple[SiteDelta, float]]:
        """What the adapters change at a site, with their weights."""
        for adapter, weight in self.adapters:
            found = adapter.at(site)
            if found is not None:
                yield found, weight


def groups_of(
    batch: ForwardBatch, table: AdapterTable, sequences: Iterable[int], device: torch.device
) -> list[RowGroup]:
    """Rows by mix, for rows of which `sequences` says whose each is; the base's are in no group."""
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
    """[T, hidden] in `dtype`. Ids from `len(embed)` on are virtual tokens of a group's adapter."""
    tokens = tokens.long()
    x = embed[tokens.clamp(max=len(embed) - 1)].to(dtype)
    for group in groups:
        mine = tokens[group.rows]
        real = mine < len(embed)
        for delta, weight in group.at((MODEL, "embed_tokens")):
            rows, ids = group.rows[real], mine[real]
            if delta.a is not None and delta.b is not None:
                change = by_tiles(delta.a[ids].to(dtype), delta.b.T.to(dtype))
                x = x.index_add(0, rows, change * weight)
            if delta.token_ids is not None and delta.rows is not None:
                at = torch.searchsorted(delta.token_ids, ids.int()).clamp(max=len(delta.rows) - 1)
                changed = delta.token_ids[at] == ids
                own = delta.rows[at[changed]].to(dtype) * weight
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
    """One fused matrix with what the groups make of it. [T, in] -> [T, sum of widths].

    `modules` are the `(name, width)` whose outputs lie side by side.
    """
    y = product(x)
    for group in groups:
        dense = group.dense.get((layer, fused)) if group.dense is not None else None
        if dense is not None:
            own = by_tiles(x[group.rows], dense.weight.to(x.dtype))
            if dense.bias is not None:
                own = own + dense.bias.to(x.dtype)
            y.index_copy_(0, group.rows, own)
            continue
        start = 0
        for name, width in modules:
            columns = y[:, start : start + width]
            changes = list(group.at((layer, name)))
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
    changes: Sequence[tuple[SiteDelta, float]],
    rows: torch.Tensor,
    product: Product,
) -> None:
    gain = _blend([(change.in_gain, weight) for change, weight in changes])
    if gain is not None:
        y.index_copy_(0, rows, product(x[rows] * gain.to(x.dtype)))
    gain = _blend([(change.gain, weight) for change, weight in changes])
    if gain is not None:
        y.index_copy_(0, rows, y[rows] * gain.to(y.dtype))
    for change, weight in changes:
        if change.a is not None and change.b is not None:
            a, b = change.a.to(x.dtype), change.b.to(x.dtype)
            y.index_add_(0, rows, by_tiles(by_tiles(x[rows], a), b.T) * weight)
        if change.bias is not None:
            y.index_add_(0, rows, (change.bias.to(y.dtype) * weight).expand(len(rows), -1))


def _blend(gains: Sequence[tuple[torch.Tensor | None, float]]) -> torch.Tensor | None:
    """1 + sum of weight * (gain - 1); None if there is no gain at all."""
    present = [(gain, weight) for gain, weight in gains if gain is not None]
    if not present:
        return None
    if len(present) == 1 and present[0][1] == 1.0:
        return present[0][0]
    return 1 + torch.stack([(gain - 1) * weight for gain, weight in present]).sum(0)


def norm_weights(
    site: Site, weight: torch.Tensor, groups: Sequence[RowGroup]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`(rows, weight)` of the groups that norm with a weight of their own, float32."""
    for group in groups:
        changes = [(change.bias, w) for change, w in group.at(site) if change.bias is not None]
        if changes:
            yield group.rows, autograd.wide(weight) + sum(bias * w for bias, w in changes)


def add_bottlenecks(
    added: torch.Tensor,
    stream: torch.Tensor,
    normed: torch.Tensor,
    site: Site,
    groups: Sequence[RowGroup],
) -> torch.Tensor:
    """A block's output `added` [T, hidden] with what the bottlenecks after it make of it.

    `stream` is the residual stream without it, `normed` what the block read.
    """
    result = added
    for group in groups:
        for change, weight in group.at(site):
            assert change.a is not None
            assert change.b is not None
            read = {
                Reads.NORMED: normed,
                Reads.OUTPUT: added,
                Reads.STREAM: stream + added,
                Reads.INCOMING: stream,
            }[change.reads][group.rows]
            inner = by_tiles(read, change.a.to(read.dtype))
            if change.hidden_bias is not None:
                inner = inner + change.hidden_bias.to(read.dtype)
            up = by_tiles(_activated(inner, change.activation), change.b.T.to(read.dtype))
            if change.bias is not None:
                up = up + change.bias.to(read.dtype)
            result = result.index_add(0, group.rows, up * weight)
    return result


def _activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    # Rows of whole vectors: torch computes what is left over of them with other instructions.
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE))
    return _ACTIVATIONS[activation](padded)[:, : x.shape[1]]


def add_head(
    scores: torch.Tensor, hidden: torch.Tensor, groups: Sequence[RowGroup]
) -> torch.Tensor:
    """float32 logits [R, vocab] of states [R, hidden], with the groups' changes of the head."""
    for group in groups:
        for change, weight in group.at((MODEL, "lm_head")):
            x = hidden[group.rows]
            if change.a is not None and change.b is not None:
                own = by_tiles(by_tiles(x, change.a.to(x.dtype)), change.b.T.to(x.dtype))
                scores = scores.index_add(0, group.rows, autograd.wide(own) * weight)
            if change.token_ids is not None and change.rows is not None:
                own = autograd.wide(by_tiles(x, change.rows.to(x.dtype))) * weight
                at = (group.rows[:, None], change.token_ids[None, :].long())
                scores = scores.index_put(at, own, accumulate=True)
    return scores


def of_rows(groups: Sequence[RowGroup], rows: slice) -> list[RowGroup]:
    """The groups as they are among the rows of a slice, which count from 0 there."""
    found = []
    for group in groups:
        inside = (group.rows >= rows.start) & (group.rows < rows.stop)
        if bool(inside.any()):
            found.append(replace(group, rows=group.rows[inside] - rows.start))
    return found


def _mix(batch: ForwardBatch, sequence: int) -> Mix:
    span = slice(int(batch.mix_starts[sequence]), int(batch.mix_starts[sequence + 1]))
    slots, weights = batch.mix_slots[span].tolist(), batch.mix_weights[span].tolist()
    return tuple(zip(slots, weights, strict=True))
