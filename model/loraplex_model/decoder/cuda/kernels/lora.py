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
