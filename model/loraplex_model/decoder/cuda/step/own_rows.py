"""Changes that the LoRA kernels do not make, in torch, on the rows that have them alone.

These are changed norms, bottlenecks, input gains, embeddings, heads, virtual tokens and merged
matrices. Rows with the same mix lie side by side, so every step works on slices, and all sizes are
known on the host: nothing is read back from the device. The formulas are those of `adapters.mix`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from loraplex_model.adapters import mix
from loraplex_model.adapters.delta import (
    AdapterDelta,
    BottleneckDelta,
    NormDelta,
    ProjectionDelta,
    Reads,
    RowsDelta,
)
from loraplex_model.adapters.table import DenseMatrices, SlotTable, Uses
from loraplex_model.base.config import MODEL, DecoderConfig, NormSpan, Site
from loraplex_model.decoder.cuda.plan import RowSegment
from loraplex_model.decoder.forward import apply_norm
from loraplex_model.ops import autograd, rope
from loraplex_model.ops.linear import by_tiles

Product = Callable[[torch.Tensor, torch.Tensor], None]
"""Writes the base's product of a fused matrix, bias included: x [n, in], out [n, out]."""

_Delta = TypeVar("_Delta", ProjectionDelta, RowsDelta, NormDelta, BottleneckDelta)


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent rows with the same mix."""

    rows: slice
    uses: Uses
    adapters: tuple[tuple[AdapterDelta, float], ...]
    dense: DenseMatrices | None

    def at(self, site: Site, kind: type[_Delta]) -> Iterator[tuple[_Delta, float]]:
        """The adapters' changes at a site, each with its weight."""
        for adapter, weight in self.adapters:
            found = adapter.at(site, kind)
            if found is not None:
                yield found, weight


@dataclass(frozen=True, slots=True)
class HeadStates:
    """What the norms and the rotation of queries and keys read and write.

    Attributes:
        qkv: [T, (heads + 2 * kv_heads) * head_dim].
        table_rows, kv_slots: int32 [T].
        cos, sin: float32 [positions, width / 2]; None if nothing is rotated.
        query_scales: float32 [positions]; None for 1.
        q: [T, heads, head_dim].
        keys: [blocks, kv_heads, block_size, head_dim].
        q_norm, k_norm: the base's weights.
    """

    qkv: torch.Tensor
    table_rows: torch.Tensor
    kv_slots: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    query_scales: torch.Tensor | None
    q: torch.Tensor
    keys: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor


class OwnRows:
    """The rows of one pass whose changes need code in torch."""

    def __init__(
        self,
        table: SlotTable,
        segments: Sequence[RowSegment],
        head_segments: Sequence[RowSegment],
        config: DecoderConfig,
        has_virtual: bool,
        state_segments: Sequence[RowSegment] = (),
    ) -> None:
        """Prepares the rows' changes.

        Args:
            segments, head_segments, state_segments: the rows of the pass, those of the logits and
                those of the states, by mix.
            has_virtual: whether some of the tokens are virtual.
        """
        self._state_runs = [_run(segment, table) for segment in state_segments]
        self._runs = [_run(segment, table) for segment in segments]
        self._head_runs = [_run(segment, table) for segment in head_segments]
        self._config, self._has_virtual = config, has_virtual

    def embed(
        self, x: torch.Tensor, tokens: torch.Tensor, last_tokens: torch.Tensor, scale: float
    ) -> None:
        """Changes embeddings x [T, hidden] of `tokens`, int32 [T], which may refer to drawn ones.

        x has been multiplied by `scale`, as are the changes, and virtual tokens where the family
        does so. The embedding of a token that could not be drawn is arbitrary.
        """
        vocab = self._config.vocab_size
        for run in self._runs:
            changes = list(run.at((MODEL, "embed_tokens"), RowsDelta))
            virtual = run.adapters[0][0].virtual
            prompts = virtual.embeddings if virtual is not None and self._has_virtual else None
            if not changes and prompts is None:
                continue
            given = tokens[run.rows]
            drawn = last_tokens.index_select(0, (-1 - given).clamp(0, len(last_tokens) - 1))
            ids = torch.where(given < 0, drawn, given).clamp(min=0)
            own = x[run.rows]
            for change, weight in changes:
                _change_embeddings(own, change, weight * scale, ids, vocab)
            if prompts is not None:
                place = (ids - vocab).clamp(0, len(prompts) - 1)
                rows = prompts.index_select(0, place).to(x.dtype)
                if self._config.scaled_prompts:
                    rows = rows * scale
                own.copy_(torch.where((ids < vocab)[:, None], own, rows))

    def norm(
        self,
        site: Site,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """Norms rows of x [T, hidden] again, whose adapters change the norm."""
        for run in _using(self._runs, Uses.NORM):
            self._norm(run, site, weight, bias, x[run.rows], normed)

    def final_norm(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        added: Sequence[torch.Tensor],
        rows: torch.Tensor,
        normed: torch.Tensor,
        *,
        of_states: bool = False,
    ) -> None:
        """The same for the last norm: x and `added` are [T, hidden], rows and normed of the logits.

        With `of_states` they are those of the states. Reads the sum of x and what the last layer
        adds to it.
        """
        for run in _using(self._state_runs if of_states else self._head_runs, Uses.NORM):
            wanted = rows[run.rows]
            state = x.index_select(0, wanted)
            for delta in added:
                state = state + delta.index_select(0, wanted) * self._config.residual_scale
            self._norm(run, (MODEL, "norm"), weight, bias, state, normed)

    def _norm(
        self,
        run: _Run,
        site: Site,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        changes = list(run.at(site, NormDelta))
        if changes:
            own_weight, own_bias = mix.changed_norm(weight, bias, changes)
            normed[run.rows] = apply_norm(self._config, state, own_weight, own_bias)[0]

    def head_norms(self, layer: int, states: HeadStates) -> None:
        """Norms and rotates queries and keys again where an adapter changes the norms of heads."""
        _, heads, width = states.q.shape
        _, kv_heads, block_size, _ = states.keys.shape
        for run in _using(self._runs, Uses.NORM):
            q_weight = _norm_weight(run, (layer, "q_norm"), states.q_norm)
            k_weight = _norm_weight(run, (layer, "k_norm"), states.k_norm)
            if q_weight is None and k_weight is None:
                continue
            qkv = states.qkv[run.rows]
            q, k = qkv[:, : heads * width], qkv[:, heads * width : (heads + kv_heads) * width]
            at = states.table_rows[run.rows]
            q = self._turned(q, states.q_norm if q_weight is None else q_weight, at, states)
            if states.query_scales is not None:
                q = q * states.query_scales.index_select(0, at)[:, None, None].to(q.dtype)
            states.q[run.rows] = q
            slots = states.kv_slots[run.rows].long()
            place = (slots // block_size, slots % block_size)
            own_keys = self._turned(k, states.k_norm if k_weight is None else k_weight, at, states)
            states.keys.transpose(1, 2).index_put_(place, own_keys)

    def _turned(
        self, x: torch.Tensor, weight: torch.Tensor, at: torch.Tensor, states: HeadStates
    ) -> torch.Tensor:
        """Queries or keys x [n, heads * head_dim], normed and rotated, [n, heads, head_dim]."""
        config = self._config
        heads = x.reshape(len(x), -1, config.head_dim)
        whole = x if config.qk_norm_span is NormSpan.ALL else heads
        normed = apply_norm(config, whole, weight, None)[0].view(heads.shape)
        if states.cos is None or states.sin is None:
            return normed
        cos, sin = (table.index_select(0, at)[:, None] for table in (states.cos, states.sin))
        turned = rope.rotate(normed.float(), cos, sin, interleaved=config.rope_interleaved)
        return turned.to(x.dtype)

    def project(
        self,
        layer: int,
        fused: str,
        modules: Sequence[tuple[str, int]],
        x: torch.Tensor,
        y: torch.Tensor,
        product: Product,
    ) -> None:
        """Replaces the base's product y [T, out] of x [T, in] for merged rows and input gains.

        `modules` are names and widths of the projections whose outputs lie side by side.
        """
        for run in self._runs:
            dense = run.dense.get((layer, fused)) if run.dense is not None else None
            if dense is not None:
                own = by_tiles(x[run.rows], dense.weight.to(x.dtype))
                y[run.rows] = own if dense.bias is None else own + dense.bias.to(x.dtype)
            elif run.uses & Uses.IN_GAIN:
                _apply_input_gains(run, layer, modules, x, y, product)

    def add_bottlenecks(
        self,
        layer: int,
        name: str,
        added: torch.Tensor,
        stream: torch.Tensor,
        normed: torch.Tensor,
        residual_scale: float,
    ) -> None:
        """Adds the outputs of the bottlenecks after a block to the block's output `added`.

        `stream` is the residual stream before `residual_scale` times `added` is added, and `normed`
        the block's input; all are [T, hidden].
        """
        for run in _using(self._runs, Uses.BOTTLENECK):
            own = added[run.rows]
            total = own
            for change, weight in run.at((layer, name), BottleneckDelta):
                read = {
                    Reads.NORMED: normed[run.rows],
                    Reads.OUTPUT: own,
                    Reads.STREAM: stream[run.rows] + own * residual_scale,
                    Reads.INCOMING: stream[run.rows],
                }[change.reads]
                total = total + mix.bottleneck(change, read) * weight
            own.copy_(total)

    def add_head(self, scores: torch.Tensor, hidden: torch.Tensor) -> None:
        """Changes logits, float32 [R, vocab], of the normed states `hidden` [R, hidden]."""
        for run in _using(self._head_runs, Uses.HEAD):
            own, x = scores[run.rows], hidden[run.rows]
            for change, weight in run.at((MODEL, "lm_head"), RowsDelta):
                if change.factors is not None:
                    a, b = (factor.to(x.dtype) for factor in change.factors)
                    own += autograd.wide(by_tiles(by_tiles(x, a), b.T)) * weight
                if change.changed_rows is not None:
                    token_ids, rows = change.changed_rows
                    more = autograd.wide(by_tiles(x, rows.to(x.dtype))) * weight  # [n, ids]
                    own.index_add_(1, token_ids, more)


def _run(segment: RowSegment, table: SlotTable) -> _Run:
    return _Run(
        slice(segment.first, segment.end),
        segment.uses,
        tuple((table.delta(slot), weight) for slot, weight in segment.mix),
        table.dense(segment.mix) if segment.merged >= 0 else None,
    )


def _using(runs: Sequence[_Run], use: Uses) -> Iterator[_Run]:
    return (run for run in runs if run.uses & use)


def _norm_weight(run: _Run, site: Site, weight: torch.Tensor) -> torch.Tensor | None:
    """The norm weight of the run's rows, float32; None if it is the base's."""
    changes = [
        change.weight * factor
        for change, factor in run.at(site, NormDelta)
        if change.weight is not None
    ]
    return autograd.wide(weight) + sum(changes) if changes else None


def _change_embeddings(
    own: torch.Tensor, change: RowsDelta, weight: float, ids: torch.Tensor, vocab: int
) -> None:
    """Adds to embeddings `own` [n, hidden] what one adapter changes for tokens `ids`, int32 [n]."""
    if change.factors is not None:
        a, b = change.factors
        rows = a.index_select(0, ids.clamp(max=vocab - 1)).to(own.dtype)
        more = by_tiles(rows, b.T.to(own.dtype)) * weight
        own += more.masked_fill_((ids >= vocab)[:, None], 0.0)
    if change.changed_rows is not None:
        token_ids, differences = change.changed_rows
        place = torch.searchsorted(token_ids, ids).clamp(max=len(token_ids) - 1)
        more = differences.index_select(0, place).to(own.dtype) * weight
        own += more.masked_fill_((token_ids.index_select(0, place) != ids)[:, None], 0.0)


def _apply_input_gains(
    run: _Run,
    layer: int,
    modules: Sequence[tuple[str, int]],
    x: torch.Tensor,
    y: torch.Tensor,
    product: Product,
) -> None:
    end = 0
    for name, width in modules:
        start, end = end, end + width
        changes = run.at((layer, name), ProjectionDelta)
        gain = mix.blend([(change.in_gain, weight) for change, weight in changes])
        if gain is not None:
            own = y.new_empty(run.rows.stop - run.rows.start, y.shape[1])
            product(x[run.rows] * gain.to(x.dtype), own)
            y[run.rows, start:end] = own[:, start:end]
