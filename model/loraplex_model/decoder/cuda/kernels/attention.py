"""Causal attention over the paged cache, with grouped queries, sliding windows and bounded chunks.

The query heads that share a key/value head are rows of the same products, so keys and values are
read once for all of them. The softmax is computed block by block with a running maximum (Milakov
and Gimelshein, arXiv 1805.02867), in float32. `loraplex_model.decoder.cuda.tiles` says how a pass
is divided and what a row's bits depend on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.common import (
    TYPES,
    Compilation,
    product_precision,
    product_type,
    rounded,
)
from loraplex_model.decoder.cuda.tiles import CHUNK, FIELDS, MOST_CHUNKS, height

WIDEST = 256
"""The widest heads that the kernels compute."""


@dataclass(frozen=True, slots=True)
class DeviceTiles:
    """Tiles on the device; those past the count are padding, and nothing is computed for them.

    Attributes:
        fields: int32 [capacity, FIELDS], as in `AttentionTiles`.
        count: int32 [1], the number of tiles in use.
        chunks: for short tiles the most chunks that a context may have; 0 for tall tiles.
    """

    fields: torch.Tensor
    count: torch.Tensor
    chunks: int = 0


def scratch_floats(rows: int, chunks: int, heads: int, head_dim: int) -> int:
    """Numbers that `attend_short` needs as scratch for `rows` short tiles of `chunks` chunks."""
    return rows * chunks * heads * (head_dim + 2) if chunks > 1 else 0


def attend_short(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: DeviceTiles,
    scratch: torch.Tensor,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Attention of the rows in short tiles; other rows of `out` are left as they are.

    Args:
        q: [T, heads, head_dim], with its rotation.
        keys, values: [blocks, kv_heads, block_size, head_dim]; slots past a context are not read.
        tables: int32 [S, B], rows may be strided; entries past a sequence's length are not read.
        tiles: `tiles.chunks` must be no less than the chunks of any tile.
        scratch: float32, at least `scratch_floats(capacity, tiles.chunks, heads, head_dim)` long.
        out: [T, heads, head_dim] in the type of q.
        window: keys that a query sees, itself included; None for all.
    """
    rows, heads = len(tiles.fields), q.shape[1]
    assert 0 < tiles.chunks <= MOST_CHUNKS
    assert scratch.dtype == torch.float32
    assert scratch.numel() >= scratch_floats(rows, tiles.chunks, *q.shape[1:])
    _launch(q, keys, values, tables, tiles, scratch, out, window)
    if tiles.chunks > 1:
        _combine[(rows, heads)](
            out,
            scratch,
            tiles.fields,
            tiles.count,
            rows,
            tiles.chunks,
            window or 0,
            **_combine_constants(heads, q.shape[2], window is not None),
            num_warps=4,
        )


def attend_tall(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: DeviceTiles,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Attention of the rows in tall tiles; see `attend_short`."""
    assert tiles.chunks == 0
    _launch(q, keys, values, tables, tiles, out, out, window)


def _launch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: DeviceTiles,
    scratch: torch.Tensor,
    out: torch.Tensor,
    window: int | None,
) -> None:
    (_, heads, head_dim), (_, kv_heads, block_size, _) = q.shape, keys.shape
    assert q.dtype == keys.dtype == values.dtype == out.dtype
    assert q.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == q.shape
    assert keys.shape == values.shape
    assert head_dim <= WIDEST
    assert tables.stride(1) == 1
    is_short, capacity = tiles.chunks > 0, len(tiles.fields)
    constants, options = _configuration(
        heads, kv_heads, head_dim, block_size, q.dtype, is_short, window is not None
    )
    _attend[(capacity, kv_heads, max(tiles.chunks, 1))](
        q,
        keys,
        values,
        tables,
        tiles.fields,
        tiles.count,
        out,
        scratch,
        capacity,
        tiles.chunks,
        tables.stride(0),
        window or 0,
        **constants,
        **options,
    )


def _configuration(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    is_short: bool,
    is_windowed: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `_attend` and the options of its launch.

    Short tiles wait for memory, so they have the most stages; blocks of tall tiles are as large as
    registers allow. Products in float32 are computed without tensor cores.
    """
    width = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        block, warps, stages = (16, 8, 2) if width <= 128 else (16, 16, 1)
    elif is_short:
        # with masks for the padding of a width there are no registers for so many
        block, warps, stages = (64 if width <= 128 else 32), 4, (5 if head_dim == width else 3)
    else:
        block, warps, stages = {128: (32, 4, 3), 256: (32, 8, 2)}.get(width, (64, 4, 3))
    assert CHUNK % block == 0
    constants = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "BLOCK_SIZE": block_size,
        "HEIGHT": height(heads // kv_heads, is_short=is_short),
        "BLOCK": block,
        "FIELDS": FIELDS,
        "SCALE": head_dim**-0.5 * math.log2(math.e),
        "IS_SHORT": is_short,
        "IS_WINDOWED": is_windowed,
        "DT": product_type(dtype),
        "PRECISION": product_precision(dtype),
    }
    return constants, {"num_warps": warps, "num_stages": stages}


def _combine_constants(heads: int, head_dim: int, is_windowed: bool) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "WIDTH": triton.next_power_of_2(head_dim),
        "MOST_CHUNKS": MOST_CHUNKS,
        "FIELDS": FIELDS,
        "IS_WINDOWED": is_windowed,
    }


_UNSPECIALISED = ["capacity", "chunks", "table_stride", "window"]


@triton.jit
def _walk(
    query, at, start, end, keys, values, table, head, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, IS_WINDOWED: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
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


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _attend(
    q, keys, values, tables, fields, count, out, scratch, capacity, chunks, table_stride, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
    SCALE: tl.constexpr, IS_SHORT: tl.constexpr, IS_WINDOWED: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
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
        query,
        position + row,
        start,
        end,
        keys,
        values,
        tables + sequence.to(tl.int64) * table_stride,
        head,
        window,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK,
        SCALE,
        IS_WINDOWED,
        DT,
        PRECISION,
    )
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
def _combine(
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
        return  # `_attend` has written the row
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


_BLOCK_SIZE = 32
_SHAPES = {
    "llama_8b": (32, 8, 128),
    "smollm2": (9, 3, 64),
    "head_80": (32, 8, 80),
    "head_256": (16, 8, 256),
}


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    found = []
    for model, shape in _SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for is_windowed in (False, True):
                found += [
                    _attend_compilation(model, shape, dtype, is_short, is_windowed)
                    for is_short in (True, False)
                ]
                found.append(_combine_compilation(model, shape, dtype, is_windowed))
    return found


def _attend_compilation(
    model: str, shape: tuple[int, int, int], dtype: torch.dtype, is_short: bool, is_windowed: bool
) -> Compilation:
    kind = str(TYPES[dtype])
    constants, options = _configuration(*shape, _BLOCK_SIZE, dtype, is_short, is_windowed)
    signature = {
        **dict.fromkeys(("q", "keys", "values"), f"*{kind}"),
        **dict.fromkeys(("tables", "fields", "count"), "*i32"),
        "out": f"*{kind}",
        "scratch": "*fp32" if is_short else f"*{kind}",
        **dict.fromkeys(_UNSPECIALISED, "i32"),
    }
    name = f"attend_{'short' if is_short else 'tall'}_{model}_{kind}{_ending(is_windowed)}"
    is_hot = dtype != torch.float32  # the slow type of comparisons may spill
    return Compilation(_attend, name, signature, constants, **options, is_hot=is_hot)


def _combine_compilation(
    model: str, shape: tuple[int, int, int], dtype: torch.dtype, is_windowed: bool
) -> Compilation:
    heads, _, head_dim = shape
    kind = str(TYPES[dtype])
    signature = {
        "out": f"*{kind}",
        "scratch": "*fp32",
        **dict.fromkeys(("fields", "count"), "*i32"),
        **dict.fromkeys(("capacity", "chunks", "window"), "i32"),
    }
    constants = _combine_constants(heads, head_dim, is_windowed)
    name = f"attend_combine_{model}_{kind}{_ending(is_windowed)}"
    return Compilation(_combine, name, signature, constants, num_warps=4, is_hot=True)


def _ending(is_windowed: bool) -> str:
    return "_window" if is_windowed else ""
