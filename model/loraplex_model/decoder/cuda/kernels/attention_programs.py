"""The programs of the attention kernels; `attention` has their configurations and launches.

Scores are in units in which the softmax is a power of two, and so is CAP, c in
`c * tanh(score / c)`; 0 leaves this out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.common import rounded, softcapped

UNSPECIALISED = ["capacity", "chunks", "table_stride", "window"]
"""Numbers of `attend_kernel` that are not compiled into it."""


@triton.jit
def _walk(
    query, at, start, end, keys, values, table, head, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, IS_WINDOWED: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Mixed values, highest score and sum of weights of queries at `at` over keys start to end."""
    HEIGHT: tl.constexpr = query.shape[0]
    WIDTH: tl.constexpr = query.shape[1]
    d = tl.arange(0, WIDTH)
    top = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([HEIGHT], tl.float32)
    acc = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for block in range(start, end, BLOCK):
        n = block + tl.arange(0, BLOCK)
        is_key = n < end
        page = tl.load(table + n // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        place = ((page * KV_HEADS + head) * BLOCK_SIZE + n % BLOCK_SIZE) * HEAD_DIM
        place = place[:, None] + d[None, :]
        is_cell = is_key[:, None] & (d < HEAD_DIM)[None, :]
        key = tl.load(keys + place, mask=is_cell, other=0.0).to(DT)  # [BLOCK, WIDTH]
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        if CAP != 0.0:
            scores = softcapped(scores, CAP)
        is_seen = n[None, :] <= at[:, None]
        if IS_WINDOWED:
            is_seen &= n[None, :] > at[:, None] - window
        scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # a row that sees no key so far keeps its sums at zero
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + place, mask=is_cell, other=0.0).to(DT)
        acc = tl.dot(weights.to(DT), value, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_kernel(
    q, keys, values, tables, fields, count, out, scratch, capacity, chunks, table_stride, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, IS_SHORT: tl.constexpr, IS_WINDOWED: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one tile for one key/value head; grid (capacity, kv_heads, chunks or 1)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    used, tile = tl.load(count), tl.program_id(0)
    if tile >= used:
        return
    if not IS_SHORT:
        tile = used - 1 - tile  # the longest contexts of a prompt first
    fields += tile * FIELDS
    begin, rows, sequence = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    position, length = tl.load(fields + 3), tl.load(fields + 4)
    context, chunk = position + rows, tl.program_id(2)
    start = chunk * length
    if IS_WINDOWED:
        start = tl.maximum(start, tl.maximum(position - window + 1, 0) // BLOCK * BLOCK)
    end = tl.minimum(chunk * length + length, context)
    if start >= end:
        return

    head = tl.program_id(1)
    m, d = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    row = m // GROUP
    is_used = (row < rows)[:, None] & (d < HEAD_DIM)[None, :]
    query_head = head * GROUP + m % GROUP
    cell = ((begin + row).to(tl.int64) * HEADS + query_head)[:, None] * HEAD_DIM + d[None, :]
    query = tl.load(q + cell, mask=is_used, other=0.0).to(DT)  # [HEIGHT, WIDTH]
    acc, top, total = _walk(
        query, position + row, start, end, keys, values,
        tables + sequence.to(tl.int64) * table_stride, head, window, KV_HEADS, HEAD_DIM, BLOCK_SIZE,
        BLOCK, SCALE, CAP, IS_WINDOWED, DT, PRECISION
    )  # fmt: skip
    if IS_SHORT and length < context:
        part = (tile.to(tl.int64) * HEADS + query_head) * chunks + chunk
        tl.store(scratch + part[:, None] * HEAD_DIM + d[None, :], acc, mask=is_used)
        sums = scratch + capacity.to(tl.int64) * HEADS * chunks * HEAD_DIM + part * 2
        tl.store(sums, top, mask=row < rows)
        tl.store(sums + 1, total, mask=row < rows)
        return
    mixed = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + cell, rounded(mixed, out.dtype.element_ty), mask=is_used)


@triton.jit(do_not_specialize=["capacity", "chunks", "window"])
def combine_kernel(
    out, scratch, fields, count, capacity, chunks, window,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MOST_CHUNKS: tl.constexpr,
    FIELDS: tl.constexpr, IS_WINDOWED: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of one row for one query head, in one order; grid (capacity, heads)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count):
        return
    fields += tile * FIELDS
    begin, position, length = tl.load(fields), tl.load(fields + 3), tl.load(fields + 4)
    context = position + 1
    if context <= length:
        return  # `attend_kernel` has written the row
    c = tl.arange(0, MOST_CHUNKS)
    d = tl.arange(0, WIDTH)
    is_part = c * length < context
    if IS_WINDOWED:
        is_part &= (c + 1) * length > position - window + 1
    part = (tile.to(tl.int64) * HEADS + head) * chunks + c
    sums = scratch + capacity.to(tl.int64) * HEADS * chunks * HEAD_DIM + part * 2
    tops = tl.load(sums, mask=is_part, other=float("-inf"))
    weights = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(weights * tl.load(sums + 1, mask=is_part, other=0.0), 0)
    is_cell = is_part[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(scratch + part[:, None] * HEAD_DIM + d[None, :], mask=is_cell, other=0.0)
    mixed = tl.sum(parts * weights[:, None], 0) / total
    cell = (begin.to(tl.int64) * HEADS + head) * HEAD_DIM + d
    tl.store(out + cell, rounded(mixed, out.dtype.element_ty), mask=d < HEAD_DIM)
