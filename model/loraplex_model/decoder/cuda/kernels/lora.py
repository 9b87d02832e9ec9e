"""LoRA on mixed rows: one launch for A x and one for B h, whatever the number of adapters.

A fused matrix has parts, the projections whose outputs lie side by side. For the rows of a chunk

    y = gain * y + sum over terms of w (B (A x) + bias),    gain = 1 + sum w (gain_i - 1)

where y is the base's result, and addresses and exact ranks come from the table of addresses. Sums
are in float32; y is rounded once, and A x is rounded to the compute dtype, times its weight.

`shrink` writes A x in a fixed number of partial sums over parts of the input, and `expand` adds
these up in order: no atomics, and no sum depends on the other rows or on their adapters. Programs
loop over the chunks whose number the device says, so the grid depends on the capacity alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import CHUNK_ROWS

_RANKS = 32  # ranks of a tile: with fewer, some of a program's four warps would have none
_MAX_SPLITS = 8
_SPLIT_INPUTS = 512  # inputs of a partial sum, at least
_PROGRAMS = 2048  # of a launch, about: several for each of a GPU's multiprocessors


@dataclass(frozen=True, slots=True)
class ShrinkShape:
    """How `shrink` computes A x for inputs of one width.

    Attributes:
        splits: partial sums.
        span: inputs of a partial sum.
        step: inputs of a tile.
    """

    splits: int
    span: int
    step: int


def shrink_shape(fan_in: int) -> ShrinkShape:
    """The configuration of `shrink`, which depends on the shape of the matrix alone."""
    step = 128 if fan_in >= 1024 else 64
    steps = -(-fan_in // step)
    splits = min(_MAX_SPLITS, max(1, fan_in // _SPLIT_INPUTS))
    per_split = -(-steps // splits)
    return ShrinkShape(-(-steps // per_split), per_split * step, step)


def expand_columns(widths: Sequence[int]) -> int:
    """Outputs of a tile of `expand` for parts of these widths."""
    total = sum(widths)
    return 256 if total >= 16384 else 128 if total >= 2048 else 64


def h_size(lora: LoraPass, fan_in: int, parts: int) -> int:
    """Number of float32 elements of A x for one fused matrix."""
    capacity = lora.capacity
    return shrink_shape(fan_in).splits * parts * capacity.h_rows * capacity.rank_stride


def h_view(scratch: torch.Tensor, lora: LoraPass, fan_in: int, parts: int) -> torch.Tensor:
    """A x of one fused matrix at the front of a float32 buffer.

    Its shape is [partial sums, parts, capacity.h_rows, capacity.rank_stride]. Only the rows of
    chunks and the exact ranks are written and read.
    """
    capacity = lora.capacity
    shape = (shrink_shape(fan_in).splits, parts, capacity.h_rows, capacity.rank_stride)
    return scratch[: h_size(lora, fan_in, parts)].view(shape)


@triton.jit
def _address(entry, word, TYPE: tl.constexpr):
    """The pointer in a word of an entry; tensors of adapters begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(entry + word).to(tl.pointer_type(TYPE)), 16)


@triton.jit(do_not_specialize=["h_rows", "rank_stride", "sites", "site"])
def shrink_kernel(
    x,
    h,
    entries,
    chunk_begin,
    chunk_end,
    chunk_count,
    term_start,
    term_slot,
    term_row,
    h_rows,
    rank_stride,
    sites,
    site,
    FAN_IN: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
    TYPE: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (lanes, splits * parts): one partial sum of one part, for every lanes-th chunk."""
    split = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
    stride = tl.multiple_of(rank_stride, 16)
    h += tl.program_id(1).to(tl.int64) * h_rows * stride
    for c in range(tl.program_id(0), tl.load(chunk_count), tl.num_programs(0)):
        m = tl.load(chunk_begin + c) + tl.arange(0, ROWS)
        ok = m < tl.load(chunk_end + c)
        x_rows = x + m.to(tl.int64)[:, None] * FAN_IN
        for t in range(tl.load(term_start + c), tl.load(term_start + c + 1)):
            slot = tl.load(term_slot + t).to(tl.int64)
            entry = entries + (slot * sites + site + part) * ENTRY_WORDS
            rank = tl.load(entry + 8).to(tl.int32)
            a = _address(entry, 0, TYPE)
            rows = (tl.load(term_row + t) + tl.arange(0, ROWS)).to(tl.int64)
            for first in range(0, rank, RANKS):
                r = first + tl.arange(0, RANKS)
                total = tl.zeros((ROWS, RANKS), tl.float32)
                for i in range(0, SPAN, STEP):
                    k = split * SPAN + i + tl.arange(0, STEP)
                    inside = (k < FAN_IN)[None, :]
                    xs = tl.load(x_rows + k[None, :], mask=ok[:, None] & inside, other=0.0)
                    ranks = tl.load(
                        a + r.to(tl.int64)[:, None] * FAN_IN + k[None, :],
                        mask=(r < rank)[:, None] & inside,
                        other=0.0,
                    )
                    total = tl.dot(
                        xs.to(DT), tl.trans(ranks.to(DT)), total, input_precision=PRECISION
                    )
                at = h + rows[:, None] * stride + r[None, :]
                tl.store(at, total, mask=ok[:, None] & (r < rank)[None, :])


@triton.jit
def _changed(
    own,
    h,
    entries,
    term_slot,
    term_weight,
    term_row,
    first_term,
    last_term,
    h_rows,
    rank_stride,
    sites,
    site,
    part,
    ok,
    n,
    width,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
    TYPE: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the base's result, float32 [ROWS, BN], with the changes of a chunk's adapters.

    The tile's columns `n` belong to a part of `width` outputs. Also returns whether any adapter
    changes the part.
    """
    stride = tl.multiple_of(rank_stride, 16)
    inside = n < width
    total = tl.zeros((ROWS, BN), tl.float32)
    gain = tl.full((BN,), 1.0, tl.float32)
    bias = tl.zeros((BN,), tl.float32)
    gains = 0
    changes = 0
    for t in range(first_term, last_term):
        slot = tl.load(term_slot + t).to(tl.int64)
        weight = tl.load(term_weight + t)
        entry = entries + (slot * sites + site + part) * ENTRY_WORDS
        rank = tl.load(entry + 8).to(tl.int32)
        b = _address(entry, 1, TYPE)
        has_gain = tl.load(entry + 3) != 0
        has_bias = tl.load(entry + 5) != 0
        changes = changes | rank | has_gain.to(tl.int32) | has_bias.to(tl.int32)
        if has_gain:
            mine = tl.load(_address(entry, 3, tl.float32) + n, mask=inside, other=1.0)
            # A single gain at weight 1 is used as it is: 1 + (gain - 1) would round it.
            only = (gains == 0) & (weight == 1.0)
            gain = tl.where(only, mine, gain + weight * (mine - 1.0))
            gains = 1
        if has_bias:
            bias += weight * tl.load(_address(entry, 5, tl.float32) + n, mask=inside, other=0.0)
        rows = (tl.load(term_row + t) + tl.arange(0, ROWS)).to(tl.int64)
        for first in tl.range(0, rank, RANKS, num_stages=1):
            r = first + tl.arange(0, RANKS)
            columns = tl.load(
                b + r.to(tl.int64)[:, None] * width + n[None, :],
                mask=(r < rank)[:, None] & inside[None, :],
                other=0.0,
            )
            inner = tl.zeros((ROWS, RANKS), tl.float32)
            for split in tl.static_range(SPLITS):
                partial = h + (split * PARTS + part).to(tl.int64) * h_rows * stride
                inner += tl.load(
                    partial + rows[:, None] * stride + r[None, :],
                    mask=ok[:, None] & (r < rank)[None, :],
                    other=0.0,
                )
            inner = (inner * weight).to(DT)
            total = tl.dot(inner, columns.to(DT), total, input_precision=PRECISION)
    changed = changes != 0
    return tl.where(changed, own * gain[None, :] + bias[None, :] + total, own), changed


@triton.jit(do_not_specialize=["h_rows", "rank_stride", "sites", "site"])
def expand_kernel(
    h,
    y,
    entries,
    chunk_begin,
    chunk_end,
    chunk_count,
    term_start,
    term_slot,
    term_weight,
    term_row,
    h_rows,
    rank_stride,
    sites,
    site,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    ENTRY_WORDS: tl.constexpr,
    TYPE: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (lanes, tiles of all parts): one tile of outputs, for every lanes-th chunk."""
    tile = tl.program_id(1)
    T0: tl.constexpr = (W0 + BN - 1) // BN
    T1: tl.constexpr = T0 + (W1 + BN - 1) // BN
    part = (tile >= T0).to(tl.int32) + (tile >= T1).to(tl.int32)
    width = tl.where(part == 0, W0, tl.where(part == 1, W1, W2))
    column = tl.where(part == 0, 0, tl.where(part == 1, W0, W0 + W1))
    tile = tile - tl.where(part == 0, 0, tl.where(part == 1, T0, T1))
    n = tile * BN + tl.arange(0, BN)
    for c in range(tl.program_id(0), tl.load(chunk_count), tl.num_programs(0)):
        m = tl.load(chunk_begin + c) + tl.arange(0, ROWS)
        ok = m < tl.load(chunk_end + c)
        at = y + m.to(tl.int64)[:, None] * (W0 + W1 + W2) + (column + n)[None, :]
        mask = ok[:, None] & (n < width)[None, :]
        own = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        result, changed = _changed(
            own,
            h,
            entries,
            term_slot,
            term_weight,
            term_row,
            tl.load(term_start + c),
            tl.load(term_start + c + 1),
            h_rows,
            rank_stride,
            sites,
            site,
            part,
            ok,
            n,
            width,
            PARTS,
            SPLITS,
            RANKS,
            ROWS,
            BN,
            ENTRY_WORDS,
            TYPE,
            DT,
            PRECISION,
        )
        tl.store(at, result.to(y.dtype.element_ty), mask=mask & changed)


def shrink(x: torch.Tensor, h: torch.Tensor, lora: LoraPass, site: int, parts: int) -> None:
    """Computes A x of all parts of a fused matrix for all chunks.

    `x` is [T, fan_in] in the compute dtype, `h` is that of `h_view`; `site` is the table's index of
    the first part, and the other parts follow.
    """
    raise NotImplementedError


def expand(
    h: torch.Tensor,
    y: torch.Tensor,
    lora: LoraPass,
    site: int,
    widths: Sequence[int],
    dtype: torch.dtype | None = None,
) -> None:
    """Adds the adapters' changes to the base's result `y` [T, sum of widths], in place.

    `dtype` is that of the adapters' matrices, if it is not that of `y` (at the head).
    """
    raise NotImplementedError


def expand_silu_mul(
    h: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor, lora: LoraPass, site: int
) -> None:
    """`out = silu(gate) * up`, with the adapters' changes of gate and up, for all rows.

    `gate_up` [T, 2 * ff] is the base's result and is only read; `out` is [T, ff]. Bit for bit what
    `expand` and `silu_mul` would compute one after the other.
    """
    raise NotImplementedError
