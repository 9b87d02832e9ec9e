"""Choosing the next tokens on the device, from logits and the parameters of each draw.

The rules, the order of operations and the random numbers are those of the server's sampler in
numpy: penalties, temperature, top-k, top-p, min-p, then the inverse of the running sum by id. The
two differ where the random number or a threshold falls within rounding (about 1e-6) of a boundary,
because `exp` is rounded differently. A row's token depends on no other row.

One program works on one row, in the row's own memory, and nothing is sorted (`thresholds`).

Estimated, not measured, on an H100 with 128,256 tokens: 10 to 15 us for a pass over a row from L2
by 512 threads, with the rows of a step on different multiprocessors. Greedy rows take 1 pass, plain
temperature 2, top-p or top-k about 7 passes and 20 us in registers: 0.1 ms a step, so a row is not
divided among several programs. Rows whose logits are all but equal can take 0.3 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels import penalties
from loraplex_model.decoder.cuda.kernels.common import Compilation
from loraplex_model.decoder.cuda.kernels.records import (
    HUGE,
    INF,
    INF_BITS,
    IS_PENALISED,
    MAGNITUDE,
    MIN_P,
    ONE_BITS,
    RECORD,
    ROW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    clipped,
    float32,
    float64,
)
from loraplex_model.decoder.cuda.kernels.thresholds import distances, load_block, threshold

_BLOCK = 4096
"""Values that a program reads at once; the search for the largest, all that greedy rows need, reads
twice as many."""
_TILE = 4096
"""Values that are divided in registers."""
_LINE_BLOCK = 4096
_WARPS = 16


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
    block: int = _BLOCK,
) -> None:
    """Chooses a token for each draw and writes it over `last_tokens`. Changes the logits.

    Args:
        logits: float32 [R, vocab], contiguous. Rows that a draw chooses from are overwritten, so
            lines that the host wants are copied before (`copy_lines`).
        draws: the draws; the grid covers their capacity, `draws.count` is read by the kernels.
        last_tokens: int32 [capacity or more]. Before: the tokens of the draws of the launch before,
            which `pending` refers to. After: the tokens of these draws; -1 if the row's logits are
            not all finite. Elements from the count on stay as they are.
        kept: from `workspace`; its width, a power of 2, is the number of values that are divided in
            registers.
        block: values that a program reads at once, a power of 2.
    """
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    capacity, vocab = len(draws.records), logits.shape[1]
    if capacity == 0:
        return
    assert len(last_tokens) >= capacity
    assert len(kept) >= capacity
    # Two launches, so that every draw has read the tokens of the launch before when the first of
    # them is overwritten.
    penalties.penalise(logits, draws.records, draws.lists, draws.count, last_tokens)
    _choose[(capacity,)](
        logits,
        draws.records,
        draws.count,
        last_tokens,
        kept,
        num_warps=_WARPS,
        enable_fp_fusion=False,
        **_constants(vocab, kept.shape[1], block),
    )


def copy_lines(
    logits: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, lines: torch.Tensor
) -> None:
    """Copies row `rows[i]` of the logits, float32 [R, vocab], to `lines[i]`, [capacity, vocab].

    `rows` is int32 [capacity]; `count`, int32 [1], says how many of them are copied.
    """
    assert logits.is_contiguous()
    assert lines.is_contiguous()
    capacity, vocab = lines.shape
    if capacity:
        _copy_lines[(capacity, triton.cdiv(vocab, _LINE_BLOCK))](
            logits, rows, count, lines, VOCAB=vocab, BLOCK=_LINE_BLOCK, num_warps=4
        )


def _constants(vocab: int, tile: int, block: int = _BLOCK) -> Mapping[str, int]:
    block = min(block, max(128, triton.next_power_of_2(vocab)))
    blocks = triton.next_power_of_2(triton.cdiv(vocab, block))
    return {"VOCAB": vocab, "BLOCK": block, "BLOCKS": blocks, "TILE": tile}


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    found = []
    for vocab in (128256, 49152):
        found += [
            *penalties.penalty_compilations(vocab),
            Compilation(
                _copy_lines,
                f"copy_lines_{vocab}",
                {"logits": "*fp32", "rows": "*i32", "count": "*i32", "lines": "*fp32"},
                {"VOCAB": vocab, "BLOCK": _LINE_BLOCK},
                num_warps=4,
            ),
            Compilation(
                _choose,
                f"choose_{vocab}",
                {
                    "logits": "*fp32",
                    "records": "*i32",
                    "count": "*i32",
                    "last_tokens": "*i32",
                    "kept": "*i32",
                },
                _constants(vocab, _TILE),
                num_warps=_WARPS,
            ),
        ]
    return found


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
def _largest(row, limit, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value within +-limit, the first id that has it, and whether all are finite."""
    best = tl.full((BLOCK // 4, 4), -INF, tl.float32)
    first = tl.full((BLOCK // 4, 4), VOCAB, tl.int32)
    most = tl.zeros((BLOCK // 4, 4), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at, values = load_block(row, start, 0.0, VOCAB, BLOCK)
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & MAGNITUDE)
        values = tl.where(at < VOCAB, clipped(values, limit), -INF)
        first = tl.where(values > best, at, first)
        best = tl.maximum(best, values)
    largest = tl.max(tl.max(best, 1), 0)
    token = tl.min(tl.min(tl.where(best == largest, first, VOCAB), 1), 0)
    return largest, token, tl.max(tl.max(most, 1), 0) < INF_BITS


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
        at, values = load_block(row, start, 0.0, VOCAB, BLOCK)
        below = distances(values, largest, limit, temperature)
        remains = INF_BITS - below.to(tl.int32, bitcast=True) >= least_key
        weights = tl.exp(-below)
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
        tl.load(record + TOP_K),
        float64(record, TOP_P),
        float32(record, MIN_P),
    )
    least_key = tl.full((), 0, tl.int32)
    if (top_k > 0) & (top_k < VOCAB):
        # The first interval is divided at distances of 32, 8 and 2: most k-th logits are between.
        low = tl.full((), -1, tl.int32)
        high = tl.full((), INF_BITS, tl.int32)
        least_key, _, _ = threshold(
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
        high = tl.full((), ONE_BITS, tl.int32)
        width = high - low
        target = top_p * total
        key, above, equal = threshold(
            row, kept, target, low, high, low + width // 4, low + width // 2, high - width // 4,
            live, largest, limit, temperature, True, VOCAB, BLOCK, TILE,
        )  # fmt: skip
        each = key.to(tl.float32, bitcast=True).to(tl.float64)
        places = tl.minimum((target - above) / each, equal.to(tl.float64))
        equals = tl.maximum(tl.math.ceil(places).to(tl.int32), 1)
        tl.debug_barrier()
        sums = _keep(row, key, equals, equals >= equal, min_p, VOCAB, BLOCK, BLOCKS)
        tl.debug_barrier()
    return _invert(row, sums, float64(record, UNIFORM), VOCAB, BLOCK, BLOCKS)


@triton.jit
def _choose(
    logits, records, count, last_tokens, kept, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chooses a draw's token."""
    draw = tl.program_id(0)
    if draw >= tl.load(count):
        return
    record = records + draw * RECORD
    row = logits + tl.load(record + ROW).to(tl.int64) * VOCAB
    limit = tl.where(tl.load(record + IS_PENALISED) != 0, HUGE, INF)
    temperature = float32(record, TEMPERATURE)
    largest, token, are_finite = _largest(row, limit, VOCAB, 2 * BLOCK)
    if are_finite & (temperature > 0.0):
        token = _draw(
            row, kept + draw * TILE, record, largest, limit, temperature, VOCAB, BLOCK, BLOCKS,
            TILE,
        )  # fmt: skip
    tl.store(last_tokens + draw, tl.where(are_finite, token, -1))
