"""How the sampling kernels read the records of `draws.DrawTable`, and numbers as bits."""

from __future__ import annotations

import triton
import triton.language as tl

from loraplex_model.decoder.cuda import draws
from loraplex_model.decoder.cuda.draws import Field

# A kernel reads a global name only if it is a constant of Triton's own type.
HUGE = tl.constexpr(1e30)  # the largest penalised logit, as in the server's sampler
INF = tl.constexpr(float("inf"))
INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
ONE_BITS = tl.constexpr(0x3F800000)
ROW = tl.constexpr(int(Field.ROW))
TOP_K = tl.constexpr(int(Field.TOP_K))
TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
MIN_P = tl.constexpr(int(Field.MIN_P))
REPETITION = tl.constexpr(int(Field.REPETITION))
PRESENCE = tl.constexpr(int(Field.PRESENCE))
FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
PENDING = tl.constexpr(int(Field.PENDING))
TOP_P = tl.constexpr(int(Field.TOP_P))
UNIFORM = tl.constexpr(int(Field.UNIFORM))
IS_PENALISED = tl.constexpr(int(Field.IS_PENALISED))
SEEN_BEGIN = tl.constexpr(int(Field.SEEN_BEGIN))
SEEN_END = tl.constexpr(int(Field.SEEN_END))
COUNTED_BEGIN = tl.constexpr(int(Field.COUNTED_BEGIN))
COUNTED_END = tl.constexpr(int(Field.COUNTED_END))
RECORD = tl.constexpr(draws.RECORD)


@triton.jit
def float32(record, FIELD: tl.constexpr):
    return tl.load(record + FIELD).to(tl.float32, bitcast=True)


@triton.jit
def float64(record, FIELD: tl.constexpr):
    low = tl.load(record + FIELD).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(record + FIELD + 1).to(tl.int64) << 32
    return (high | low).to(tl.float64, bitcast=True)


@triton.jit
def is_finite(values):
    return (values.to(tl.int32, bitcast=True) & MAGNITUDE) < INF_BITS


@triton.jit
def clipped(values, limit):
    return tl.minimum(tl.maximum(values, -limit), limit)
