"""Penalties on the logits of tokens that were seen before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.common import Compilation
from loraplex_model.decoder.cuda.kernels.records import (
    COUNTED_BEGIN,
    COUNTED_END,
    FREQUENCY,
    HUGE,
    IS_PENALISED,
    PENDING,
    PRESENCE,
    RECORD,
    REPETITION,
    ROW,
    SEEN_BEGIN,
    SEEN_END,
    clipped,
    float32,
    is_finite,
)

_BLOCK = 1024
"""Ids of a list that a program reads at once."""
_WARPS = 4


def penalise(
    logits: torch.Tensor,
    records: torch.Tensor,
    lists: torch.Tensor,
    count: torch.Tensor,
    last_tokens: torch.Tensor,
) -> None:
    """Applies the penalties of all draws to their rows of the logits, in place.

    The arguments are those of `sampling.sample` and its `DeviceDraws`. Values that are not finite
    stay as they are.
    """
    _penalise[(len(records),)](
        logits,
        records,
        lists,
        count,
        last_tokens,
        VOCAB=logits.shape[1],
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # numpy rounds each product
    )


def penalty_compilations(vocab: int) -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    pointers = {"logits": "*fp32", "records": "*i32", "lists": "*i32", "count": "*i32"}
    return [
        Compilation(
            _penalise,
            f"penalise_{vocab}",
            {**pointers, "last_tokens": "*i32"},
            {"VOCAB": vocab, "BLOCK": _BLOCK},
            num_warps=_WARPS,
        )
    ]


@triton.jit
def _repeated(values, penalty):
    """Logits of tokens that were seen. Values that are not finite stay, to be found later."""
    near = clipped(values, HUGE)
    near = tl.where(near < 0, near * penalty, tl.math.div_rn(near, penalty))
    return tl.where(is_finite(values), clipped(near, HUGE), values)


@triton.jit
def _counted(values, counts, frequency, presence):
    """Logits of tokens that were generated `counts` times."""
    near = clipped(values, HUGE) - frequency * counts - presence
    return tl.where(is_finite(values), clipped(near, HUGE), values)


@triton.jit
def _penalise(logits, records, lists, count, last_tokens, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Applies a draw's penalties to the logits of the tokens in its lists, in place."""
    draw = tl.program_id(0)
    if draw >= tl.load(count):
        return
    record = records + draw * RECORD
    if tl.load(record + IS_PENALISED) == 0:
        return
    row = logits + tl.load(record + ROW).to(tl.int64) * VOCAB
    repetition = float32(record, REPETITION)
    frequency, presence = float32(record, FREQUENCY), float32(record, PRESENCE)
    k = tl.load(record + PENDING)
    pending = tl.load(last_tokens + k, mask=k >= 0, other=-1)
    begin, end = tl.load(record + SEEN_BEGIN), tl.load(record + SEEN_END)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(lists + at, mask=at < end, other=-1)
        own = (ids >= 0) & (ids < VOCAB) & (ids != pending)
        values = tl.load(row + ids, mask=own, other=0.0)
        tl.store(row + ids, _repeated(values, repetition), mask=own)
    tl.debug_barrier()  # the same logit may be another thread's in the second list
    begin, end = tl.load(record + COUNTED_BEGIN), tl.load(record + COUNTED_END)
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
