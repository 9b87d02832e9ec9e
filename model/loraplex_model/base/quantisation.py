"""NF4 in numbers: its values, and the sizes of its blocks. `ops.nf4` computes with them."""

from __future__ import annotations

BLOCK = 64
"""Number of weights that share one absmax (QLoRA, arXiv 2305.14314)."""

NESTED_BLOCK = 256
"""Number of blocks whose maxima share one scale."""

CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the 16 codes: quantiles of the normal distribution, with an exact zero."""


def blocks_of(rows: int, fan_in: int) -> int:
    """Number of blocks of a module [rows, fan_in]; the last block may be short."""
    return -(-rows * fan_in // BLOCK)
