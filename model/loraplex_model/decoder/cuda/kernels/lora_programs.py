"""The programs of the LoRA kernels; `lora` has their formulas, configurations and launches.

Arguments that several have in common: `h` is A x, float32 [SPLITS, PARTS, h_rows, rank_stride];
`entries` is the table of addresses [slots, sites, ENTRY_WORDS]; `site` is the index of the first
part; the plan's arrays are those of `LoraPass`. SUMS is SPLITS, rounded up to a power of
two. TYPE is the type of the adapters' matrices, DT that of the operands of products; ROWS, RANKS,
STEP and BN are the sizes of tiles.

A fixed number of programs share the items of work, whose number follows from the number of chunks
in device memory; neighbouring items belong to one chunk, so its entries come from the L1 cache.
Whatever lies behind a plan's numbers, or between its rows and ranks, is masked out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.common import activated, rounded
from loraplex_model.decoder.cuda.plan import CHUNK_ROWS
from loraplex_model.decoder.cuda.table import WORDS

ROWS: tl.constexpr = tl.constexpr(CHUNK_ROWS)
ENTRY_WORDS: tl.constexpr = tl.constexpr(WORDS)


@triton.jit
def _share(items):
    """The items of this program, of those that all programs share."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    every = items // programs
    more = items % programs
    first = program * every + tl.minimum(program, more)
    return first, first + every + (program < more).to(tl.int32)


@triton.jit
def _address(entry, word, TYPE: tl.constexpr):
    """The pointer in a word of an entry; tensors of adapters begin at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(entry + word).to(tl.pointer_type(TYPE)), 16)


@triton.jit(do_not_specialize=["h_rows", "rank_stride", "sites", "site"])
def shrink_kernel(
    x, h, entries, chunk_begin, chunk_end, chunk_count, term_start, term_slot, term_row, h_rows,
    rank_stride, sites, site, FAN_IN: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    RANKS: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """An item is one partial sum of one part, for one chunk."""
    stride = tl.multiple_of(rank_stride, 16)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, RANKS)
    first_item, last_item = _share(tl.load(chunk_count) * (SPLITS * PARTS))
    for item in range(first_item, last_item):
        c = item // (SPLITS * PARTS)
        split = item // PARTS % SPLITS
        part = item % PARTS
        h_part = h + (split * PARTS + part).to(tl.int64) * h_rows * stride
        begin = tl.load(chunk_begin + c)
        ok = i < tl.load(chunk_end + c) - begin
        x_rows = x + begin.to(tl.int64) * FAN_IN
        for t in range(tl.load(term_start + c), tl.load(term_start + c + 1)):
            slot = tl.load(term_slot + t).to(tl.int64)
            entry = entries + (slot * sites + site + part) * ENTRY_WORDS
            rank = tl.load(entry + 8).to(tl.int32)
            a = _address(entry, 0, TYPE)
            h_term = h_part + tl.load(term_row + t).to(tl.int64) * stride
            for first in range(0, rank, RANKS):
                present = first + j < rank
                total = tl.zeros((ROWS, RANKS), tl.float32)
                a_ranks = a + tl.cast(first, tl.int64) * FAN_IN
                for k0 in range(0, SPAN, STEP):
                    k = split * SPAN + k0 + tl.arange(0, STEP)
                    inside = (k < FAN_IN)[None, :]
                    xs = tl.load(
                        x_rows + (i[:, None] * FAN_IN + k[None, :]),
                        mask=ok[:, None] & inside,
                        other=0.0,
                    )
                    own = tl.load(
                        a_ranks + (j[:, None] * FAN_IN + k[None, :]),
                        mask=present[:, None] & inside,
                        other=0.0,
                    )
                    total = tl.dot(
                        xs.to(DT), tl.trans(own.to(DT)), total, input_precision=PRECISION
                    )
                at = h_term + first + (i[:, None] * stride + j[None, :])
                tl.store(at, total, mask=ok[:, None] & present[None, :])


@triton.jit
def _changed(
    own, h, entries, term_slot, term_weight, term_row, first_term, last_term, h_rows, rank_stride,
    sites, site, part, rows, n, width, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    SUMS: tl.constexpr, RANKS: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of the base's result, float32 [ROWS, BN], with the changes of a chunk's adapters.

    The tile's columns `n` belong to a part of `width` outputs. Also returns whether any adapter
    changes the part.
    """
    stride = tl.multiple_of(rank_stride, 16)
    inside = n < width
    i = tl.arange(0, ROWS)
    j = tl.arange(0, RANKS)
    s = tl.arange(0, SUMS)
    h_part = h + tl.cast(part, tl.int64) * h_rows * stride
    partials = s.to(tl.int64) * PARTS * h_rows * stride
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
        h_term = h_part + tl.load(term_row + t).to(tl.int64) * stride
        for first in tl.range(0, rank, RANKS, num_stages=1):
            present = first + j < rank
            columns = tl.load(
                b + tl.cast(first, tl.int64) * width + (j[:, None] * width + n[None, :]),
                mask=present[:, None] & inside[None, :],
                other=0.0,
            )
            tile = first + (i[:, None] * stride + j[None, :])
            known = (i < rows)[:, None] & present[None, :]
            inner = tl.load(
                h_term + (partials[:, None, None] + tile[None, :, :]),
                mask=(s < SPLITS)[:, None, None] & known[None, :, :],
                other=0.0,
            )
            inner = (tl.sum(inner, 0) * weight).to(DT)
            total = tl.dot(inner, columns.to(DT), total, input_precision=PRECISION)
    changed = changes != 0
    return tl.where(changed, own * gain[None, :] + bias[None, :] + total, own), changed


@triton.jit(do_not_specialize=["h_rows", "rank_stride", "sites", "site"])
def expand_kernel(
    h, y, entries, chunk_begin, chunk_end, chunk_count, term_start, term_slot, term_weight,
    term_row, h_rows, rank_stride, sites, site, W0: tl.constexpr, W1: tl.constexpr,
    W2: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr,
    RANKS: tl.constexpr, BN: tl.constexpr, TYPE: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr
):  # fmt: skip
    """An item is one tile of the outputs of one part, for one chunk."""
    T0: tl.constexpr = (W0 + BN - 1) // BN
    T1: tl.constexpr = T0 + (W1 + BN - 1) // BN
    TILES: tl.constexpr = T1 + (W2 + BN - 1) // BN
    i = tl.arange(0, ROWS)
    first_item, last_item = _share(tl.load(chunk_count) * TILES)
    for item in range(first_item, last_item):
        c = item // TILES
        tile = item % TILES
        part = (tile >= T0).to(tl.int32) + (tile >= T1).to(tl.int32)
        width = tl.where(part == 0, W0, tl.where(part == 1, W1, W2))
        column = tl.where(part == 0, 0, tl.where(part == 1, W0, W0 + W1))
        tile = tile - tl.where(part == 0, 0, tl.where(part == 1, T0, T1))
        n = tile * BN + tl.arange(0, BN)
        begin = tl.load(chunk_begin + c)
        rows = tl.load(chunk_end + c) - begin
        at = y + begin.to(tl.int64) * (W0 + W1 + W2)
        at += i[:, None] * (W0 + W1 + W2) + (column + n)[None, :]
        mask = (i < rows)[:, None] & (n < width)[None, :]
        own = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        result, changed = _changed(
            own, h, entries, term_slot, term_weight, term_row, tl.load(term_start + c),
            tl.load(term_start + c + 1), h_rows, rank_stride, sites, site, part, rows, n, width,
            PARTS, SPLITS, SUMS, RANKS, BN, TYPE, DT, PRECISION
        )  # fmt: skip
        tl.store(at, rounded(result, y.dtype.element_ty), mask=mask & changed)


@triton.jit(do_not_specialize=["h_rows", "rank_stride", "sites", "site", "rows"])
def expand_gated_kernel(
    h, gate_up, out, entries, chunk_begin, chunk_end, chunk_count, term_start, term_slot,
    term_weight, term_row, row_chunk, h_rows, rank_stride, sites, site, rows, WIDTH: tl.constexpr,
    KIND: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr, RANKS: tl.constexpr,
    BN: tl.constexpr, TYPE: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """An item is one tile of outputs, for one chunk or for the base rows among `ROWS` rows."""
    TILES: tl.constexpr = (WIDTH + BN - 1) // BN
    i = tl.arange(0, ROWS)
    first_item, last_item = _share(tl.load(chunk_count) * TILES)
    for item in range(first_item, last_item):
        c = item // TILES
        n = item % TILES * BN + tl.arange(0, BN)
        inside = (n < WIDTH)[None, :]
        begin = tl.load(chunk_begin + c)
        chunk_rows = tl.load(chunk_end + c) - begin
        mask = (i < chunk_rows)[:, None] & inside
        at = gate_up + begin.to(tl.int64) * (2 * WIDTH)
        at += i[:, None] * (2 * WIDTH) + n[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        gate, _ = _changed(
            gate, h, entries, term_slot, term_weight, term_row, tl.load(term_start + c),
            tl.load(term_start + c + 1), h_rows, rank_stride, sites, site, 0, chunk_rows, n, WIDTH,
            2, SPLITS, SUMS, RANKS, BN, TYPE, DT, PRECISION
        )  # fmt: skip
        active = _as_stored(activated(_as_stored(gate, TYPE), KIND), TYPE)
        up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
        up, _ = _changed(
            up, h, entries, term_slot, term_weight, term_row, tl.load(term_start + c),
            tl.load(term_start + c + 1), h_rows, rank_stride, sites, site, 1, chunk_rows, n, WIDTH,
            2, SPLITS, SUMS, RANKS, BN, TYPE, DT, PRECISION
        )  # fmt: skip
        result = rounded(active * _as_stored(up, TYPE), TYPE)
        own = out + begin.to(tl.int64) * WIDTH
        tl.store(own + (i[:, None] * WIDTH + n[None, :]), result, mask=mask)
    first_item, last_item = _share(tl.cdiv(rows, ROWS) * TILES)
    for item in range(first_item, last_item):
        begin = item // TILES * ROWS
        n = item % TILES * BN + tl.arange(0, BN)
        inside = (n < WIDTH)[None, :]
        base = tl.load(row_chunk + begin + i, mask=begin + i < rows, other=0) < 0
        if tl.max(base.to(tl.int32), 0) > 0:
            mask = base[:, None] & inside
            at = gate_up + begin.to(tl.int64) * (2 * WIDTH)
            at += i[:, None] * (2 * WIDTH) + n[None, :]
            gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
            own = out + begin.to(tl.int64) * WIDTH
            result = rounded(_as_stored(activated(gate, KIND), TYPE) * up, TYPE)
            tl.store(own + (i[:, None] * WIDTH + n[None, :]), result, mask=mask)


@triton.jit
def _as_stored(x, TYPE: tl.constexpr):
    return rounded(x, TYPE).to(tl.float32)
