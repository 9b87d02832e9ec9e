"""Finds the threshold above which a given number, or weight, of a row's values lies.

Nothing is sorted: an interval of float32 bit patterns, whose order as integers is that of the
numbers, is divided. Passes over the row divide it into four until it holds at most `TILE` of the
row's values; these are gathered, in the order of their ids, and divided on in registers. So
thresholds are exact, every sum has a fixed order that depends on the row alone, and the number of
passes is bounded for any row (about 16 where many values are equal).
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.records import INF_BITS, clipped


@triton.jit
def load_block(row, start, other, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The row's values from `start` on, in groups of four: [BLOCK / 4, 4].

    Sums over a group need no other thread, so a pass exchanges numbers among threads at its end
    only.
    """
    at = start + tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return at, tl.load(row + at, mask=at < VOCAB, other=other)


@triton.jit
def distances(values, largest, limit, temperature):
    """How far the scaled logits are below the largest; not negative."""
    return tl.abs(tl.math.div_rn(clipped(values, limit) - largest, temperature))


@triton.jit
def _keys(row, start, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK):
    """Integers in the order of the weights, or of the scaled logits; -1 past the end."""
    at, values = load_block(row, start, 0.0, VOCAB, BLOCK)
    if BY_WEIGHT:
        keys = values.to(tl.int32, bitcast=True)
    else:
        below = distances(values, largest, limit, temperature)
        keys = INF_BITS - below.to(tl.int32, bitcast=True)
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
def threshold(
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
        filled = _gather(row, kept, low, high, largest, limit, temperature, BY_WEIGHT, VOCAB, BLOCK)
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
