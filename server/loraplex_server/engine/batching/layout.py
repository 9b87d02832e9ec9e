"""Lays the scheduler's rows out as the flat arrays of a forward pass."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from loraplex_model.base.batch import ForwardBatch

from loraplex_server.engine.batching.request import BatchRow, Logits


def lay_out(rows: Sequence[BatchRow]) -> ForwardBatch:
    """The batch of `rows`, in their order. Costs time per row, not per token of context.

    Arrays of Python grow by single numbers several times faster than those of numpy are made.
    """
    tokens, positions, contexts, tables = array("i"), array("i"), array("i"), array("i")
    starts, mix_starts, slots = array("i", [0]), array("i", [0]), array("i")
    weights, logit_rows, copies = array("f"), array("i"), array("i")
    state_rows = array("i")
    requests = [row.request for row in rows]
    widths = [len(each.prefix.shared) + len(each.blocks) for each in requests]
    width = max(widths)
    unused = array("i", bytes(4 * width))
    at = 0
    for row, used in zip(rows, widths, strict=True):
        request, start, count, logits = row
        end, prefix = at + count, request.prefix
        first = prefix.count + start
        if count == 1:
            tokens.append(request.tokens[start])
            positions.append(first)
        else:
            tokens.extend(request.tokens[start : start + count])
            positions.extend(range(first, first + count))
        contexts.append(first + count)
        starts.append(end)
        tables.extend(prefix.shared)
        tables.extend(request.blocks)
        tables.extend(unused[used:])
        if start == 0 and prefix.tail is not None:
            copies.extend((prefix.tail, request.blocks[0]))
        if start >= request.active_from:
            for slot, weight in request.mix:
                slots.append(slot)
                weights.append(weight)
        mix_starts.append(len(slots))
        if logits is Logits.LAST:
            logit_rows.append(end - 1)
        elif logits is Logits.ALL:
            logit_rows.extend(range(at, end))
        elif logits is Logits.STATE:
            state_rows.append(end - 1)
        elif logits is Logits.STATES:
            state_rows.extend(range(at, end))
        at = end
    any_long = any(each.short_positions and each.is_long for each in requests)
    return ForwardBatch(
        tokens=np.asarray(tokens),
        positions=np.asarray(positions),
        query_starts=np.asarray(starts),
        context_lens=np.asarray(contexts),
        block_tables=np.asarray(tables).reshape(len(rows), width),
        mix_starts=np.asarray(mix_starts),
        mix_slots=np.asarray(slots),
        mix_weights=np.asarray(weights),
        logit_rows=np.asarray(logit_rows),
        copies=np.asarray(copies).reshape(-1, 2),
        is_long=np.array([each.is_long for each in requests] if any_long else [], np.bool_),
        state_rows=np.asarray(state_rows),
    )
