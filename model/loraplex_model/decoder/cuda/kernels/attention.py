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

from loraplex_model.decoder.attention import Scoring
from loraplex_model.decoder.cuda.kernels.attention_programs import (
    UNSPECIALISED,
    attend_kernel,
    combine_kernel,
)
from loraplex_model.decoder.cuda.kernels.common import (
    TYPES,
    Compilation,
    product_precision,
    product_type,
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
    scoring: Scoring,
) -> None:
    """Attention of the rows in short tiles; other rows of `out` are left as they are.

    Args:
        q: [T, heads, head_dim], with its rotation.
        keys, values: [blocks, kv_heads, block_size, head_dim]; slots past a context are not read.
        tables: int32 [S, B], rows may be strided; entries past a sequence's length are not read.
        tiles: `tiles.chunks` must be no less than the chunks of any tile.
        scratch: float32, at least `scratch_floats(capacity, tiles.chunks, heads, head_dim)` long.
        out: [T, heads, head_dim] in the type of q.
    """
    rows, heads = len(tiles.fields), q.shape[1]
    assert 0 < tiles.chunks <= MOST_CHUNKS
    assert scratch.dtype == torch.float32
    assert scratch.numel() >= scratch_floats(rows, tiles.chunks, *q.shape[1:])
    _launch(q, keys, values, tables, tiles, scratch, out, scoring)
    if tiles.chunks > 1:
        combine_kernel[(rows, heads)](
            out,
            scratch,
            tiles.fields,
            tiles.count,
            rows,
            tiles.chunks,
            scoring.window or 0,
            **_combine_constants(heads, q.shape[2], scoring.window is not None),
            num_warps=4,
        )


def attend_tall(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: DeviceTiles,
    out: torch.Tensor,
    scoring: Scoring,
) -> None:
    """Attention of the rows in tall tiles; see `attend_short`."""
    assert tiles.chunks == 0
    _launch(q, keys, values, tables, tiles, out, out, scoring)


def _launch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: DeviceTiles,
    scratch: torch.Tensor,
    out: torch.Tensor,
    scoring: Scoring,
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
        heads,
        kv_heads,
        head_dim,
        block_size,
        q.dtype,
        is_short,
        scoring,
    )
    attend_kernel[(capacity, kv_heads, max(tiles.chunks, 1))](
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
        scoring.window or 0,
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
    scoring: Scoring,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `attend_kernel` and the options of its launch.

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
        "SCALE": scoring.scale * math.log2(math.e),
        "CAP": scoring.softcap * math.log2(math.e),
        "IS_SHORT": is_short,
        "IS_WINDOWED": scoring.window is not None,
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


_BLOCK_SIZE = 32
_SHAPES = {
    "llama_8b": (32, 8, 128),
    "smollm2": (9, 3, 64),
    "head_80": (32, 8, 80),
    "head_256": (16, 8, 256),
}
_CAPPED = {"gemma2_9b": (16, 8, 256), "gemma2_27b": (32, 16, 128)}
_CAP = 50.0


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
    for model, shape in _CAPPED.items():
        for is_windowed in (False, True):
            found += [
                _attend_compilation(model, shape, torch.bfloat16, is_short, is_windowed, _CAP)
                for is_short in (True, False)
            ]
    return found


def _attend_compilation(
    model: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    is_short: bool,
    is_windowed: bool,
    softcap: float = 0.0,
) -> Compilation:
    kind = str(TYPES[dtype])
    scoring = Scoring(4096 if is_windowed else None, shape[2] ** -0.5, softcap)
    constants, options = _configuration(*shape, _BLOCK_SIZE, dtype, is_short, scoring)
    signature = {
        **dict.fromkeys(("q", "keys", "values"), f"*{kind}"),
        **dict.fromkeys(("tables", "fields", "count"), "*i32"),
        "out": f"*{kind}",
        "scratch": "*fp32" if is_short else f"*{kind}",
        **dict.fromkeys(UNSPECIALISED, "i32"),
    }
    name = f"attend_{'short' if is_short else 'tall'}_{model}_{kind}{_ending(is_windowed)}"
    is_hot = dtype != torch.float32  # the slow type of comparisons may spill
    return Compilation(attend_kernel, name, signature, constants, **options, is_hot=is_hot)


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
    return Compilation(combine_kernel, name, signature, constants, num_warps=4, is_hot=True)


def _ending(is_windowed: bool) -> str:
    return "_window" if is_windowed else ""
