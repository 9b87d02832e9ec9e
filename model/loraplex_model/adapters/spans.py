"""Adapters on slices of rows, for training: `mix.project` without copies of the rows.

The rows of a job are adjacent in a training pass, so they are a slice. The adapters' changes of a
fused matrix are one autograd function, which works in place on the base's product and keeps the
few numbers per row that A gives, and x or the tensors that x is recomputed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex_model.adapters.delta import BottleneckDelta, ProjectionDelta
from loraplex_model.adapters.mix import Dropout, Product, RowGroup
from loraplex_model.base.config import Site
from loraplex_model.ops import products
from loraplex_model.ops.autograd import Recompute


@dataclass(frozen=True, slots=True)
class _Change:
    """The change of one module by the adapter of one job.

    Attributes:
        rows: the job's rows.
        columns: the module's outputs in the fused matrix.
        a, b, gain, bias: indices into the tensors given to `_Adapted`; -1 if absent.
    """

    rows: slice
    columns: slice
    site: Site
    dropout: Dropout | None
    a: int = -1
    b: int = -1
    gain: int = -1
    bias: int = -1


def project(
    product: Product,
    x: torch.Tensor,
    layer: int,
    fused: str,
    modules: Sequence[tuple[str, int]],
    groups: Sequence[RowGroup],
    recompute: Recompute | None = None,
    back: Back | None = None,
) -> torch.Tensor:
    """`mix.project` for groups that are slices, each with one adapter at weight 1.

    x [T, in] -> [T, out]. Given how to `recompute` x, the backward pass does not keep x. Given the
    base's product's derivative `back`, it adds the adapters' part to its result in one pass.
    """
    changes: list[_Change] = []
    tensors: list[torch.Tensor] = []

    def put(tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor)
        return len(tensors) - 1

    for group, columns, site, delta in _sites(layer, modules, groups):
        assert group.span is not None
        a, b = map(put, delta.factors or (None, None))
        change = _Change(
            group.span, columns, site, group.dropout, a, b, put(delta.gain), put(delta.bias)
        )
        changes.append(change)
    if not tensors or any(d.in_gain is not None for _, _, _, d in _sites(layer, modules, groups)):
        back = None
    y = _base(product, x if back is None else x.detach(), layer, modules, groups)
    if not tensors:
        return y
    result: torch.Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
        y, x, recompute or Recompute(_itself, (x,)), changes, back, *tensors
    )
    return result


def reads_output(
    layer: int, modules: Sequence[str], bottleneck: str, groups: Sequence[RowGroup]
) -> bool:
    """Whether an adapter's derivative reads the values of a block's last product."""
    sites = _sites(layer, [(name, 0) for name in modules], groups)
    return any(delta.gain is not None for _, _, _, delta in sites) or any(
        found for group in groups for found in group.at((layer, bottleneck), BottleneckDelta)
    )


Back = Callable[[torch.Tensor], torch.Tensor]
"""A product's derivative by its input: from a gradient [T, out] to one [T, in], in new memory."""


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _sites(
    layer: int, modules: Sequence[tuple[str, int]], groups: Sequence[RowGroup]
) -> Iterator[tuple[RowGroup, slice, Site, ProjectionDelta]]:
    for group in groups:
        start = 0
        for name, width in modules:
            for delta, weight in group.at((layer, name), ProjectionDelta):
                assert weight == 1.0, "a group in training has one adapter at weight 1"
                yield group, slice(start, start + width), (layer, name), delta
            start += width


def _base(
    product: Product,
    x: torch.Tensor,
    layer: int,
    modules: Sequence[tuple[str, int]],
    groups: Sequence[RowGroup],
) -> torch.Tensor:
    """The base's product [T, out], with scaled inputs for adapters that have an `in_gain`."""
    scaled = [
        (group.span, columns, delta.in_gain.to(x.dtype))
        for group, columns, _, delta in _sites(layer, modules, groups)
        if delta.in_gain is not None and group.span is not None
    ]
    if scaled and len(modules) == 1:
        gains = {rows.start: (rows, gain) for rows, _, gain in scaled}
        parts, end = [], 0
        for start in sorted(gains):
            rows, gain = gains[start]
            parts += [x[end:start], x[rows] * gain]
            end = rows.stop
        return product(torch.cat([*parts, x[end:]]))
    y = product(x)
    for rows, columns, gain in scaled:  # modules of one fused matrix may have different gains
        y = y.clone()
        y[rows, columns] = product(x[rows] * gain)[:, columns]
    return y


class _Adapted(torch.autograd.Function):
    """`y[rows, columns] = gain * y + (A x) B + bias` in place, for every change.

    Changes of the same rows are adjacent, so that all A's that read these rows are one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        recompute: Recompute,
        changes: Sequence[_Change],
        back: Back | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        saved: list[torch.Tensor] = []
        for c in changes:
            part = y[c.rows, c.columns]
            if c.gain >= 0:
                saved.append(part.clone())
                part.mul_(tensors[c.gain].to(y.dtype))
            if c.bias >= 0:
                part.add_(tensors[c.bias].to(y.dtype))
        batches = list(_read_together(changes))
        if batches and _in_kernels(x, y, tensors):
            readings = []
            for batch in batches:
                read, mask = _dropped(x[batch[0].rows], batch[0])
                readings.append(_reading(batch, tensors, read))
                saved += [readings[-1].reduced] if mask is None else [readings[-1].reduced, mask]
            products.add_low_rank(y, readings)
        else:
            saved += _add_factors(y, x, batches, tensors)
        sources = recompute.sources if any(c.a >= 0 for c in changes) else ()
        ctx.make, ctx.changes, ctx.back = recompute.make, changes, back
        ctx.counts = len(sources), len(tensors), len(saved)
        ctx.save_for_backward(*sources, *tensors, *saved)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)
        sources, tensors, saved = ([next(kept) for _ in range(count)] for count in ctx.counts)
        numbers = iter(saved)
        changes: Sequence[_Change] = ctx.changes
        wanted = ctx.needs_input_grad
        gy = grads[0]
        out: list[torch.Tensor | None] = [None] * len(tensors)
        to_y = _through_vectors(gy, changes, tensors, numbers, out)
        to_x = None
        if ctx.back is not None and wanted[1]:
            to_x = ctx.back(to_y)
        if sources:
            x = ctx.make(*sources)
            if _in_kernels(x, gy, tensors):
                if to_x is None and wanted[1]:
                    to_x = torch.zeros_like(x)
                _through_factors_in_kernels(gy, x, changes, tensors, numbers, out, to_x)
            else:
                own = _zeroed(torch.empty_like(x), changes) if wanted[1] else None
                _through_factors(gy, x, changes, tensors, numbers, out, own)
                to_x = own if to_x is None or own is None else to_x.add_(own)
        typed = [
            None if g is None or not needed else g.to(t.dtype)
            for g, t, needed in zip(out, tensors, wanted[5:], strict=True)
        ]
        return (to_y if ctx.back is None else None, to_x, None, None, None, *typed)


def _add_factors(
    y: torch.Tensor,
    x: torch.Tensor,
    batches: Sequence[Sequence[_Change]],
    tensors: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Adds `(A x) B` of every change to y. Returns what the backward pass needs of each batch."""
    saved = []
    for batch in batches:
        a = torch.cat([tensors[c.a] for c in batch]).to(x.dtype)
        read, mask = _dropped(x[batch[0].rows], batch[0])
        reduced = read @ a.T  # [rows, sum of ranks]
        saved += [reduced] if mask is None else [reduced, mask]
        for c, h in _by_rank(batch, tensors, reduced):
            y[c.rows, c.columns].addmm_(h, tensors[c.b].to(y.dtype))
    return saved


def _in_kernels(x: torch.Tensor, y: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels for bfloat16 products on the CPU compute the changes."""
    narrow = x.dtype == y.dtype == torch.bfloat16 and not x.is_cuda
    return (
        narrow
        and x.is_contiguous()
        and y.is_contiguous()
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and products.available()
    )


def _reading(
    batch: Sequence[_Change],
    tensors: Sequence[torch.Tensor],
    read: torch.Tensor,
    reduced: torch.Tensor | None = None,
) -> products.LowRankRows:
    """A batch in the form of the kernels; without `reduced` there is new memory for it."""
    if reduced is None:
        reduced = read.new_empty(len(read), sum(len(tensors[c.a]) for c in batch))
    changes = [
        products.LowRank(tensors[c.a].detach().contiguous(), tensors[c.b].detach(), c.columns.start)
        for c in batch
    ]
    return products.LowRankRows(batch[0].rows.start, read, reduced, changes)


def _through_factors_in_kernels(
    gy: torch.Tensor,
    x: torch.Tensor,
    changes: Sequence[_Change],
    tensors: Sequence[torch.Tensor],
    saved: Iterator[torch.Tensor],
    out: list[torch.Tensor | None],
    to_x: torch.Tensor | None,
) -> None:
    """`_through_factors` by the kernels for bfloat16 products, with gradients in float32.

    Adds to what `to_x` has.
    """
    batches = list(_read_together(changes))
    readings: list[products.LowRankRows] = []
    masks: list[torch.Tensor | None] = []
    into: list[torch.Tensor | None] = []
    for batch in batches:
        reduced = next(saved)
        mask = next(saved) if batch[0].dropout is not None else None
        own = x[batch[0].rows]
        read = own if mask is None else _kept(own, mask, batch[0])
        readings.append(_reading(batch, tensors, read, reduced))
        masks.append(mask)
        if to_x is None:
            into.append(None)
        else:
            into.append(to_x[batch[0].rows] if mask is None else torch.empty_like(read))
    found = products.low_rank_gradients(gy, readings, into, [mask is None for mask in masks])
    for batch, gradients, mask, part in zip(batches, found, masks, into, strict=True):
        for c, (to_a, to_b) in zip(batch, gradients, strict=True):
            out[c.a], out[c.b] = to_a, to_b
        if to_x is not None and mask is not None and part is not None:
            to_x[batch[0].rows].add_(_kept(part, mask, batch[0]))


def _through_vectors(
    gy: torch.Tensor,
    changes: Sequence[_Change],
    tensors: Sequence[torch.Tensor],
    saved: Iterator[torch.Tensor],
    out: list[torch.Tensor | None],
) -> torch.Tensor:
    """Writes the gradients of gains and biases to `out`; returns that of the base's product."""
    to_y = gy.clone() if any(c.gain >= 0 for c in changes) else gy
    for c in changes:
        part = gy[c.rows, c.columns]
        if c.gain >= 0:
            out[c.gain] = (part * next(saved)).sum(0)
            to_y[c.rows, c.columns].mul_(tensors[c.gain].to(gy.dtype))
        if c.bias >= 0:
            out[c.bias] = part.sum(0)
    return to_y


def _through_factors(
    gy: torch.Tensor,
    x: torch.Tensor,
    changes: Sequence[_Change],
    tensors: Sequence[torch.Tensor],
    saved: Iterator[torch.Tensor],
    out: list[torch.Tensor | None],
    to_x: torch.Tensor | None,
) -> None:
    """Writes the gradients of A and B to `out`, and adds that of x to `to_x`, made by `_zeroed`."""
    for batch in _read_together(changes):
        rows, dropped = batch[0].rows, batch[0].dropout is not None
        reduced = next(saved)
        mask = next(saved) if dropped else None
        to_reduced = torch.empty_like(reduced)
        into = _by_rank(batch, tensors, to_reduced)
        for (c, h), (_, to_h) in zip(_by_rank(batch, tensors, reduced), into, strict=True):
            part = gy[c.rows, c.columns]  # [rows, out]
            out[c.b] = h.T @ part  # [r, out]
            torch.mm(part, tensors[c.b].to(gy.dtype).T, out=to_h)
        read = x[rows] if mask is None else _kept(x[rows], mask, batch[0])
        ranks = [len(tensors[c.a]) for c in batch]
        to_a = torch.split(to_reduced.T @ read, ranks)  # [r, in] each
        for c, part in zip(batch, to_a, strict=True):
            out[c.a] = part
        if to_x is None:
            continue
        a = torch.cat([tensors[c.a] for c in batch]).to(x.dtype)
        if mask is None:  # then this batch has all A's of these rows
            torch.mm(to_reduced, a, out=to_x[rows])
        else:
            to_x[rows].add_(_kept(to_reduced @ a, mask, batch[0]))


def _zeroed(to_x: torch.Tensor, changes: Sequence[_Change]) -> torch.Tensor:
    """Zeroes `to_x`, except rows of jobs without dropout, which `_through_factors` overwrites."""
    whole = {(c.rows.start, c.rows.stop) for c in changes if c.a >= 0 and c.dropout is None}
    end = 0
    for start, stop in sorted(whole):
        to_x[end:start] = 0
        end = stop
    to_x[end:] = 0
    return to_x


def _read_together(changes: Sequence[_Change]) -> Iterator[list[_Change]]:
    """Groups the changes with factors that read the same input: a job's, unless it has dropout."""
    batch: list[_Change] = []
    for c in changes:
        if c.a < 0:
            continue
        if batch and (batch[0].rows != c.rows or c.dropout):
            yield batch
            batch = []
        batch.append(c)
    if batch:
        yield batch


def _by_rank(
    batch: Sequence[_Change], tensors: Sequence[torch.Tensor], reduced: torch.Tensor
) -> Iterator[tuple[_Change, torch.Tensor]]:
    """Each change of a batch with its columns [rows, r] of `reduced` [rows, sum of ranks]."""
    ranks = [len(tensors[c.a]) for c in batch]
    return zip(batch, torch.split(reduced, ranks, dim=1), strict=True)


def _dropped(x: torch.Tensor, change: _Change) -> tuple[torch.Tensor, torch.Tensor | None]:
    if change.dropout is None:
        return x, None
    mask = change.dropout.mask(change.site, x)
    return _kept(x, mask, change), mask


def _kept(x: torch.Tensor, mask: torch.Tensor, change: _Change) -> torch.Tensor:
    assert change.dropout is not None
    return (x * mask).mul_(1 / (1 - change.dropout.probability))
