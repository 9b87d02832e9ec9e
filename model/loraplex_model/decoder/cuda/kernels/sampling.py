"""Choosing the next tokens on the device, from logits and the parameters of each draw.

The rules, the order of operations and the random numbers are those of the server's sampler in
numpy: penalties, temperature, top-k, top-p, min-p, then the inverse of the running sum by id. The
two differ where the random number or a threshold falls within rounding (about 1e-6) of a boundary,
because `exp` is rounded differently.

One program works on one row, in the row's own memory, and nothing is sorted. The k-th largest logit
and the smallest weight of top-p are found by dividing an interval of float32 bit patterns, whose
order as integers is that of the numbers: passes over the row divide it into four until it holds
at most `TILE` of the row's values; these are gathered, in the order of their ids, and divided on
in registers. So thresholds are exact, every sum has a fixed order that depends on the row alone,
and the number of passes is bounded for any row (about 16 where many values are equal).

Estimated, not measured, on an H100 with 128,256 tokens: 10 us a pass from L2 by 512 threads, and
the rows of a step on different multiprocessors. Greedy rows take 1 pass, plain temperature 2.5,
top-p or top-k about 7 passes and 20 us in registers: 0.1 ms a step, so a row is not divided among
several programs. Rows whose logits are all but equal can take 0.25 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loraplex_model.decoder.cuda.draws import RECORD, Field
from loraplex_model.decoder.cuda.kernels.common import Compilation

_BLOCK = 8192
"""Values that a program reads at once."""
_TILE = 4096
"""Values that are divided in registers."""
_LINE_BLOCK = 4096
_LIST_BLOCK = 1024
_WARPS = 16

# Triton reads global names only if they are constants of its own type.
_HUGE = tl.constexpr(1e30)  # the largest penalised logit, as in the server's sampler
_INF = tl.constexpr(float("inf"))
_INF_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ONE_BITS = tl.constexpr(0x3F800000)
_ROW = tl.constexpr(int(Field.ROW))
_TOP_K = tl.constexpr(int(Field.TOP_K))
_TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
_MIN_P = tl.constexpr(int(Field.MIN_P))
_REPETITION = tl.constexpr(int(Field.REPETITION))
_PRESENCE = tl.constexpr(int(Field.PRESENCE))
_FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
_PENDING = tl.constexpr(int(Field.PENDING))
_TOP_P = tl.constexpr(int(Field.TOP_P))
_UNIFORM = tl.constexpr(int(Field.UNIFORM))
_IS_PENALISED = tl.constexpr(int(Field.IS_PENALISED))
_SEEN_BEGIN = tl.constexpr(int(Field.SEEN_BEGIN))
_SEEN_END = tl.constexpr(int(Field.SEEN_END))
_COUNTED_BEGIN = tl.constexpr(int(Field.COUNTED_BEGIN))
_COUNTED_END = tl.constexpr(int(Field.COUNTED_END))
_RECORD = tl.constexpr(RECORD)


@dataclass(frozen=True, slots=True)
class DeviceDraws:
    """A `DrawTable` in device memory.

    Attributes:
        records: int32 [capacity, RECORD]; rows from `count` on are not read.
        lists: int32 [N]; not read if no draw has penalties, so it may be empty.
        count: int32 [1], number of draws.
    """

    records: torch.Tensor
    lists: torch.Tensor
    count: torch.Tensor


def workspace(capacity: int, device: torch.device) -> torch.Tensor:
    """Memory that `sample` needs for up to `capacity` draws: int32 [capacity, 4096]."""
    return torch.empty((capacity, _TILE), dtype=torch.int32, device=device)


def sample(
    logits: torch.Tensor,
    draws: DeviceDraws,
    last_tokens: torch.Tensor,
    kept: torch.Tensor,
    *,
    block: int | None = None,
) -> None:
    """Chooses a token for each draw and writes it over `last_tokens`. Changes the logits.

    Args:
        logits: float32 [R, vocab], contiguous. Rows that a draw chooses from are overwritten, so
            lines that the host wants are copied before (`copy_lines`).
        draws: the draws; the grid covers their capacity, `draws.count` is read by the kernels.
        last_tokens: int32 [capacity or more]. Before: the tokens of the draws of the launch before,
            which `pending` refers to. After: the tokens of these draws; -1 if the row's logits are
            not all finite. Elements from the count on stay as they are.
        kept: from `workspace`; its width is the number of values that are divided in registers.
        block: values that a program reads at once, a power of 2; for tests.
    """
    assert logits.is_contiguous() and logits.dtype == torch.float32
    capacity, vocab = len(draws.records), logits.shape[1]
    if capacity == 0:
        return
    assert len(last_tokens) >= capacity and len(kept) >= capacity
    # Two launches, so that every draw has read the tokens of the launch before when the first of
    # them is overwritten.
    _penalise[(capacity,)](
        logits,
        draws.records,
        draws.lists if len(draws.lists) else draws.records,
        draws.count,
        last_tokens,
        num_warps=4,
        enable_fp_fusion=False,
        **_penalise_constants(vocab),
    )
    constants = _choose_constants(vocab, kept.shape[1])
    if block:
        constants = _choose_constants(vocab, kept.shape[1], block)
    _choose[(capacity,)](
        logits,
        draws.records,
        draws.count,
        last_tokens,
        kept,
        num_warps=_WARPS,
        enable_fp_fusion=False,
        **constants,
    )


def copy_lines(
    logits: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, lines: torch.Tensor
) -> None:
    """Copies row `rows[i]` of the logits, float32 [R, vocab], to row i of `lines` [capacity, vocab].

    `rows` is int32 [capacity]; `count`, int32 [1], says how many of them are copied.
    """
    assert logits.is_contiguous() and lines.is_contiguous()
    capacity, vocab = lines.shape
    if capacity:
        _copy_lines[(capacity, triton.cdiv(vocab, _LINE_BLOCK))](
            logits, rows, count, lines, VOCAB=vocab, BLOCK=_LINE_BLOCK, num_warps=4
        )


def _penalise_constants(vocab: int) -> Mapping[str, int]:
    return {"VOCAB": vocab, "BLOCK": _LIST_BLOCK}


def _choose_constants(vocab: int, tile: int, block: int = _BLOCK) -> Mapping[str, int]:
    block = min(block, max(128, triton.next_power_of_2(vocab)))
    blocks = triton.next_power_of_2(triton.cdiv(vocab, block))
    return {"VOCAB": vocab, "BLOCK": block, "BLOCKS": blocks, "TILE": tile}


@triton.jit
def _copy_lines(logits, rows, count, lines, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    line = tl.program_id(0)
    if line < tl.load(count):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < VOCAB
        row = tl.load(rows + line).to(tl.int64)
        values = tl.load(logits + row * VOCAB + at, mask=inside)
        tl.store(lines + line.to(tl.int64) * VOCAB + at, values, mask=inside)


@triton.jit
def _float32(record, FIELD: tl.constexpr):
    return tl.load(record + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def _float64(record, FIELD: tl.constexpr):
    low = tl.load(record + FIELD).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(record + FIELD + 1).to(tl.int64) << 32
    return (high | low).to(tl.float64, bitcast=True)


@triton.jit
def _is_finite(values):
    return (values.to(tl.int32, bitcast=True) & _MAGNITUDE) < _INF_BITS


@triton.jit
def _clipped(values, limit):
    return tl.minimum(tl.maximum(values, -limit), limit)


# ------------------------------------------------------------------------------------- penalties


@triton.jit
def _repeated(values, penalty):
    """Logits of tokens that were seen. Values that are not finite stay, to be found later."""
    near = _clipped(values, _HUGE)
    near = tl.where(near < 0, near * penalty, tl.math.div_rn(near, penalty))
    return tl.where(_is_finite(values), _clipped(near, _HUGE), values)


@triton.jit
def _counted(values, counts, frequency, presence):
    """Logits of tokens that were generated `counts` times."""
    near = _clipped(values, _HUGE) - frequency * counts - presence
    return tl.where(_is_finite(values), _clipped(near, _HUGE), values)


@triton.jit
def _penalise(
    logits, records, lists, count, last_tokens, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """Applies a draw's penalties to the logits of the tokens in its lists, in place."""
    draw = tl.program_id(0)
    if draw >= tl.load(count):
        return
    record = records + draw * _RECORD
    if tl.load(record + _IS_PENALISED) == 0:
        return
    row = logits + tl.load(record + _ROW).to(tl.int64) * VOCAB
    repetition = _float32(record, _REPETITION)
    frequency, presence = _float32(record, _FREQUENCY), _float32(record, _PRESENCE)
    k = tl.load(record + _PENDING)
    pending = tl.load(last_tokens + k, mask=k >= 0, other=-1)
    begin, end = tl.load(record + _SEEN_BEGIN), tl.load(record + _SEEN_END)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(lists + at, mask=at < end, other=-1)
        own = (ids >= 0) & (ids < VOCAB) & (ids != pending)
        values = tl.load(row + ids, mask=own, other=0.0)
        tl.store(row + ids, _repeated(values, repetition), mask=own)
    tl.debug_barrier()  # the same logit may be another thread's in the second list
    begin, end = tl.load(record + _COUNTED_BEGIN), tl.load(record + _COUNTED_END)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(lists + at, mask=at < end, other=-1)
        counts = tl.load(lists + end - begin + at, mask=at < end, other=0)
        counts = counts.to(tl.float32, bitcast=True)
        own = (ids >= 0) & (ids < VOCAB) & (ids != pending)
        values = tl.load(row + ids, mask=own, other=0.0)
        tl.store(row + ids, _counted(values, counts, frequency, presence), mask=own)
        found += tl.where((ids == pending) & (ids >= 0), counts, 0.0)
    if (pending >= 0) & (pending < VOCAB):
        value = _repeated(tl.load(row + pending), repetition)
        tl.store(row + pending, _counted(value, tl.sum(found) + 1.0, frequency, presence))


# --------------------------------------------------------------------------------------- choosing


@triton.jit
def _block(row, start, other, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The row's values from `start` on, in groups of four: [BLOCK / 4, 4].

    Sums over a group need no other thread, so a pass exchanges numbers among threads at its end
    only.
    """
    at = start + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return at, tl.load(row + at, mask=at < VOCAB, other=other)


@triton.jit
def _largest(row, limit, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value within +-limit, the first id that has it, and whether all are finite."""
    best = tl.full((BLOCK // 4, 4), -_INF, tl.float32)
    first = tl.full((BLOCK // 4, 4), VOCAB, tl.int32)
    most = tl.zeros((BLOCK // 4, 4), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at, values = _block(row, start, 0.0, VOCAB, BLOCK)
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & _MAGNITUDE)
        values = tl.where(at < VOCAB, _clipped(values, limit), -_INF)
        first = tl.where(values > best, at, first)
        best = tl.maximum(best, values)
    largest = tl.max(tl.max(best, 1), 0)
    token = tl.min(tl.min(tl.where(best == largest, first, VOCAB), 1), 0)
    return largest, token, tl.max(tl.max(most, 1), 0) < _INF_BITS


@triton.jit
def _distance(values, largest, limit, temperature):
    """How far the scaled logits are below the largest; not negative."""
    return tl.abs(tl.math.div_rn(_clipped(values, limit) - largest, temperature))


@triton.jit
def _keys(row, start, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK):
    """Integers in the order of the weights, or of the scaled logits; -1 past the end."""
    at, values = _block(row, start, 0.0, VOCAB, BLOCK)
    if BY_WEIGHT:
        keys = values.to(tl.int32, bitcast=True)
    else:
        distance = _distance(values, largest, limit, temperature)
        keys = _INF_BITS - distance.to(tl.int32, bitcast=True)
    return tl.where(at < VOCAB, keys, -1)


@triton.jit
def _measure(keys, above, BY_WEIGHT: tl.constexpr):
    """What a value above the threshold counts: its weight, or 1."""
    if BY_WEIGHT:
        amounts = keys.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        amounts = tl.full(keys.shape, 1.0, tl.float64)
    return tl.where(above, amounts, 0.0)


@triton.jit
def _sums_above(
    row, a, b, c, largest, limit, temperature, BY_WEIGHT: tl.constexpr, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the values with keys above `a`, `b` and `c` measure, and how many they are."""
    sum_a = tl.zeros((BLOCK // 4,), tl.float64)
    sum_b = tl.zeros((BLOCK // 4,), tl.float64)
    sum_c = tl.zeros((BLOCK // 4,), tl.float64)
    n_a = tl.zeros((BLOCK // 4,), tl.int32)
    n_b = tl.zeros((BLOCK // 4,), tl.int32)
    n_c = tl.zeros((BLOCK // 4,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        keys = _keys(row, start, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK)
        n_a += tl.sum((keys > a).to(tl.int32), 1)
        n_b += tl.sum((keys > b).to(tl.int32), 1)
        n_c += tl.sum((keys > c).to(tl.int32), 1)
        if BY_WEIGHT:
            sum_a += tl.sum(_measure(keys, keys > a, BY_WEIGHT), 1)
            sum_b += tl.sum(_measure(keys, keys > b, BY_WEIGHT), 1)
            sum_c += tl.sum(_measure(keys, keys > c, BY_WEIGHT), 1)
    n_a, n_b, n_c = tl.sum(n_a, 0), tl.sum(n_b, 0), tl.sum(n_c, 0)
    if BY_WEIGHT:
        s_a, s_b, s_c = tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)
    else:
        s_a, s_b, s_c = n_a.to(tl.float64), n_b.to(tl.float64), n_c.to(tl.float64)
    return s_a, s_b, s_c, n_a, n_b, n_c


@triton.jit
def _gather(
    row, kept, low, high, largest, limit, temperature, BY_WEIGHT: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the keys in (low, high] to `kept`, in the order of their ids; returns how many."""
    filled = 0
    for start in range(0, VOCAB, BLOCK):
        keys = _keys(row, start, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK)
        keys = tl.reshape(keys, (BLOCK,))
        taken = (keys > low) & (keys <= high)
        places = tl.cumsum(taken.to(tl.int32), 0)
        tl.store(kept + filled + places - 1, keys, mask=taken)
        filled += tl.sum(taken.to(tl.int32), 0)
    return filled


@triton.jit
def _threshold(
    row, kept, target, low, high, a, b, c, n_low, largest, limit, temperature,
    BY_WEIGHT: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest key t in (low, high] such that the values above it measure less than `target`.

    The values above `low` must measure at least `target`, those above `high` less. `a <= b <= c`,
    within [low, high], divide the interval first; `n_low` is an upper bound of the number of values
    above `low`.

    Returns t, what the values above t measure, and how many values equal t.
    """
    n_high = 0
    s_high = tl.zeros((), tl.float64)
    while (high - low > 1) & (n_low - n_high > TILE):
        s_a, s_b, s_c, n_a, n_b, n_c = _sums_above(
            row, a, b, c, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK
        )
        is_a, is_b, is_c = s_a < target, s_b < target, s_c < target
        low, n_low = tl.where(is_a, low, a), tl.where(is_a, n_low, n_a)
        low, n_low = tl.where(is_b, low, b), tl.where(is_b, n_low, n_b)
        low, n_low = tl.where(is_c, low, c), tl.where(is_c, n_low, n_c)
        high, n_high = tl.where(is_c, c, high), tl.where(is_c, n_c, n_high)
        high, n_high = tl.where(is_b, b, high), tl.where(is_b, n_b, n_high)
        high, n_high = tl.where(is_a, a, high), tl.where(is_a, n_a, n_high)
        s_high = tl.where(is_c, s_c, s_high)
        s_high = tl.where(is_b, s_b, s_high)
        s_high = tl.where(is_a, s_a, s_high)
        width = high - low
        a, b, c = low + width // 4, low + width // 2, high - width // 4
    if high - low > 1:
        filled = _gather(
            row, kept, low, high, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK
        )
        tl.debug_barrier()
        place = tl.arange(0, TILE)
        tile = tl.load(kept + place, mask=place < filled, other=-1)
        # All of these are above `low`, and `n_low` was only a bound.
        base, n_base = s_high, n_high
        n_low = n_base + filled
        while high - low > 1:
            middle = low + (high - low) // 2
            above = tile > middle
            s = base + tl.sum(_measure(tile, above, BY_WEIGHT), 0)
            n = n_base + tl.sum(above.to(tl.int32), 0)
            is_less = s < target
            high, low = tl.where(is_less, middle, high), tl.where(is_less, low, middle)
            n_high, n_low = tl.where(is_less, n, n_high), tl.where(is_less, n_low, n)
            s_high = tl.where(is_less, s, s_high)
    return high, s_high, n_low - n_high


@triton.jit
def _weigh(
    row, largest, limit, temperature, least_key, least_weight, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Replaces the row's logits by weights: 1 for the largest, 0 for those that do not remain.

    Returns the sum of each block, float64 [BLOCKS], and the number of weights above 0.
    """
    sums = tl.zeros((BLOCKS,), tl.float64)
    live = tl.zeros((BLOCK // 4,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at, values = _block(row, start, 0.0, VOCAB, BLOCK)
        distance = _distance(values, largest, limit, temperature)
        remains = _INF_BITS - distance.to(tl.int32, bitcast=True) >= least_key
        weights = tl.exp(-distance)
        remains = remains & (weights >= least_weight) & (at < VOCAB)
        weights = tl.where(remains, weights, 0.0)
        tl.store(row + at, weights, mask=at < VOCAB)
        live += tl.sum((weights > 0.0).to(tl.int32), 1)
        block = tl.sum(tl.sum(weights.to(tl.float64), 1), 0)
        sums = tl.where(tl.arange(0, BLOCKS) == start // BLOCK, block, sums)
    return sums, tl.sum(live, 0)


@triton.jit
def _keep(
    row, threshold, equals, are_all, least_weight, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sets to 0 the weights below the threshold, and all but the first `equals` that equal it.

    `are_all`: no more weights than `equals` equal the threshold. Returns the sum of each block.
    """
    sums = tl.zeros((BLOCKS,), tl.float64)
    before = 0
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weights = tl.load(row + at, mask=at < VOCAB, other=0.0)
        keys = weights.to(tl.int32, bitcast=True)
        if are_all:
            remains = keys >= threshold
        else:
            equal = (keys == threshold).to(tl.int32)
            rank = before + tl.cumsum(equal, 0)
            remains = (keys > threshold) | ((equal > 0) & (rank <= equals))
            before += tl.sum(equal, 0)
        weights = tl.where(remains & (weights >= least_weight), weights, 0.0)
        tl.store(row + at, weights, mask=at < VOCAB)
        block = tl.sum(weights.to(tl.float64), 0)
        sums = tl.where(tl.arange(0, BLOCKS) == start // BLOCK, block, sums)
    return sums


@triton.jit
def _invert(row, sums, uniform, VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """The id at which the running sum of the weights passes the fraction `uniform` of the total."""
    index = tl.arange(0, BLOCKS)
    ends = tl.cumsum(sums, 0)
    target = uniform * tl.sum(tl.where(index == BLOCKS - 1, ends, 0.0), 0)
    # Rounding may lead past the last token that has any weight.
    last = tl.max(tl.where(sums > 0.0, index, 0), 0)
    block = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
    before = tl.sum(tl.where(index == block - 1, ends, 0.0), 0)
    place = tl.arange(0, BLOCK)
    at = block * BLOCK + place
    weights = tl.load(row + at, mask=at < VOCAB, other=0.0)
    inner = before + tl.cumsum(weights.to(tl.float64), 0)
    passed = tl.sum((inner <= target).to(tl.int32), 0)
    found = tl.max(tl.where((weights > 0.0) & (place <= passed), place, -1), 0)
    first = tl.min(tl.where(weights > 0.0, place, BLOCK - 1), 0)
    return block * BLOCK + tl.where(found < 0, first, found)


@triton.jit
def _draw(
    row, kept, record, largest, limit, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token by chance, from the logits of a row after penalties."""
    top_k, top_p, min_p = (
        tl.load(record + _TOP_K),
        _float64(record, _TOP_P),
        _float32(record, _MIN_P),
    )
    least_key = tl.full((), 0, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        # The first interval is divided at distances of 32, 8 and 2: most k-th logits are between.
        low = tl.full((), -1, tl.int32)
        high = tl.full((), _INF_BITS, tl.int32)
        least_key, _, _ = _threshold(
            row, kept, top_k.to(tl.float64), low, high, high - 0x42000000, high - 0x41000000,
            high - 0x40000000, tl.full((), VOCAB, tl.int32), largest, limit, temperature, False,
            VOCAB, BLOCK, TILE,
        )  # fmt: skip
    is_cut = top_p < 1.0
    sums, live = _weigh(
        row, largest, limit, temperature, least_key, tl.where(is_cut, 0.0, min_p), VOCAB, BLOCK,
        BLOCKS,
    )  # fmt: skip
    tl.debug_barrier()
    if is_cut:
        total = tl.sum(sums, 0)
        # All weights below this bound sum to less than 1 - top_p of the total.
        bound = ((1.0 - top_p) * total / VOCAB).to(tl.float32)
        low = tl.maximum(tl.minimum(bound, 1.0).to(tl.int32, bitcast=True) - 2, 0)
        high = tl.full((), _ONE_BITS, tl.int32)
        width = high - low
        target = top_p * total
        key, above, equal = _threshold(
            row, kept, target, low, high, low + width // 4, low + width // 2, high - width // 4,
            live, largest, limit, temperature, True, VOCAB, BLOCK, TILE,
        )  # fmt: skip
        each = key.to(tl.float32, bitcast=True).to(tl.float64)
        places = tl.minimum((target - above) / each, equal.to(tl.float64))
        equals = tl.maximum(tl.math.ceil(places).to(tl.int32), 1)
        tl.debug_barrier()
        sums = _keep(row, key, equals, equals >= equal, min_p, VOCAB, BLOCK, BLOCKS)
        tl.debug_barrier()
    return _invert(row, sums, _float64(record, _UNIFORM), VOCAB, BLOCK, BLOCKS)


@triton.jit
def _choose(
    logits, records, count, last_tokens, kept, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chooses a draw's token."""
    draw = tl.program_id(0)
    if draw >= tl.load(count):
        return
    record = records + draw * _RECORD
    row = logits + tl.load(record + _ROW).to(tl.int64) * VOCAB
    limit = tl.where(tl.load(record + _IS_PENALISED) != 0, _HUGE, _INF)
    temperature = _float32(record, _TEMPERATURE)
    largest, token, are_finite = _largest(row, limit, VOCAB, BLOCK)
    if are_finite & (temperature > 0.0):
        token = _draw(
            row, kept + draw * TILE, record, largest, limit, temperature, VOCAB, BLOCK, BLOCKS,
            TILE,
        )  # fmt: skip
    tl.store(last_tokens + draw, tl.where(are_finite, token, -1))


# ------------------------------------------------------------------------- compiled ahead of time


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    pointers = {"logits": "*fp32", "records": "*i32", "count": "*i32", "last_tokens": "*i32"}
    found = []
    for vocab in (128256, 49152):
        found += [
            Compilation(
                _copy_lines,
                f"copy_lines_{vocab}",
                {"logits": "*fp32", "rows": "*i32", "count": "*i32", "lines": "*fp32"},
                _line_constants(vocab),
                num_warps=4,
            ),
            Compilation(
                _penalise,
                f"penalise_{vocab}",
                {**pointers, "lists": "*i32"},
                _penalise_constants(vocab),
                num_warps=4,
            ),
            Compilation(
                _choose,
                f"choose_{vocab}",
                {**pointers, "kept": "*i32"},
                _choose_constants(vocab, _TILE),
                num_warps=_WARPS,
            ),
        ]
    return found


def _line_constants(vocab: int) -> Mapping[str, Any]:
    return {"VOCAB": vocab, "BLOCK": _LINE_BLOCK}
