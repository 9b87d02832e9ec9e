"""Lays the scheduler's rows out as the flat arrays of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from loraplex_model.base.batch import ForwardBatch

from loraplex_server.engine.batching.scheduler import BatchRow, Logits


def lay_out(rows: Sequence[BatchRow]) -> ForwardBatch:
    """The batch of `rows`, in their order. Costs time per row, not per token of context."""
    counts = [row.count for row in rows]
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    total = int(starts[-1])
    tokens = np.empty(total, np.int32)
    requests = [row.request for row in rows]
    first = np.array([row.request.prefix.count + row.start for row in rows], np.int32)
    positions = np.arange(total, dtype=np.int32) + np.repeat(first - starts[:-1], counts)
    widths = [len(each.prefix.shared) + len(each.blocks) for each in requests]
    tables = np.zeros((len(rows), max(widths)), np.int32)
    mix_starts = [0]
    mix: list[tuple[int, float]] = []
    logit_rows: list[int] = []
    copies: list[tuple[int, int]] = []
    at = 0
    for index, row in enumerate(rows):
        request, start, count, logits = row
        end, prefix = at + count, request.prefix
        if count == 1:
            tokens[at] = request.tokens[start]
        else:
            tokens[at:end] = request.tokens[start : start + count]
        shared = len(prefix.shared)
        if shared:
            tables[index, :shared] = prefix.shared
        tables[index, shared : widths[index]] = request.blocks
        if start == 0 and prefix.tail is not None:
            copies.append((prefix.tail, request.blocks[0]))
        if start >= request.active_from:
            mix += request.mix
        mix_starts.append(len(mix))
        if logits is Logits.LAST:
            logit_rows.append(end - 1)
        elif logits is Logits.ALL:
            logit_rows.extend(range(at, end))
        at = end
    any_long = any(each.short_positions and each.is_long for each in requests)
    return ForwardBatch(
        tokens=tokens,
        positions=positions,
        query_starts=starts,
        context_lens=first + np.array(counts, np.int32),
        block_tables=tables,
        mix_starts=np.array(mix_starts, np.int32),
        mix_slots=np.array([slot for slot, _ in mix], np.int32),
        mix_weights=np.array([weight for _, weight in mix], np.float32),
        logit_rows=np.array(logit_rows, np.int32),
        copies=np.array(copies, np.int32).reshape(-1, 2),
        is_long=np.array([each.is_long for each in requests] if any_long else [], np.bool_),
    )
