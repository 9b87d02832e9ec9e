"""NF4 with double quantisation (QLoRA, arXiv 2305.14314), as bitsandbytes stores it.

Quantising calls bitsandbytes, or a kernel that gives the same bytes in a fraction of the time
(`ops.quantise`). Dequantising needs neither, since importing bitsandbytes takes seconds:
a weight is

    code[nibble] * (map[absmax byte] * scale of its 256 blocks + offset)

in float32 with one rounding per operation, which gives the same bits as bitsandbytes.
Blocks of 64 run over a module's flattened matrix, so they cross row ends if the row length is not a
multiple of 64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from loraplex_model.base.quantisation import BLOCK, CODE
from loraplex_model.base.quantisation import NESTED_BLOCK as NESTED_BLOCK
from loraplex_model.base.quantisation import blocks_of as blocks_of
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.ops.quiet import quieten_bitsandbytes

_CHUNK = BLOCK * 65536  # weights quantised in one call, so that scratch memory stays small


def nf4_code(device: torch.device | str = "cpu") -> torch.Tensor:
    """The values of NF4, float32 [16]: quantiles of the normal distribution, with an exact zero."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the 8-bit code for maxima, float32 [256], ascending.

    This is a signed dynamic exponent code (arXiv 1511.04561): each decade from 1e-6 to 1 has twice
    as many linear steps as the one below, and 0 and 1 are exact.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        steps = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += steps.tolist() + (-steps).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


class QuantiseBlocks(Protocol):
    """A kernel for `quantise`: from flat weights [n], of a floating type, to codes and maxima.

    Codes are uint8 [ceil(n / 2)], maxima float32 [ceil(n / 64)], both as `bnb.quantize_4bit` makes
    them of the weights widened to float32.
    """

    def __call__(self, weights: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor]: ...


def quantise(weight: torch.Tensor, blocks: QuantiseBlocks | None = None) -> NF4Matrix:
    """Quantises one module's [out, in] to the bytes of bitsandbytes' `Linear4bit`.

    The values are quantised as stored, widened to float32. Blocks are independent, and `blocks`
    quantises them (default: bitsandbytes); the second quantisation is over the whole module.

    Raises `ValueError` if a weight, or what is stored of the maxima, is not finite.
    """
    quieten_bitsandbytes()
    import bitsandbytes.functional as bnb

    rows, fan_in = weight.shape
    packed, absmax = (blocks or _with_bitsandbytes)(weight.reshape(-1))
    offset = absmax.mean()
    nested, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    if not (absmax.isfinite().all() and offset.isfinite() and state.absmax.isfinite().all()):
        raise ValueError("there are values that are not finite, or too large")
    return NF4Matrix((rows, fan_in), packed, nested, (state.absmax,), (offset.item(),), (rows,))


def _with_bitsandbytes(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import bitsandbytes.functional as bnb

    packed, maxima = [], []
    for chunk in torch.split(flat, _CHUNK):
        codes, state = bnb.quantize_4bit(chunk.float(), blocksize=BLOCK, quant_type="nf4")
        packed.append(codes.reshape(-1))
        maxima.append(state.absmax)
    return torch.cat(packed), torch.cat(maxima)


def stack(parts: Sequence[NF4Matrix]) -> NF4Matrix:
    """Stacks the rows of several modules, which have the same input, into one matrix.

    If only some have double quantisation, the stack has the float32 maxima of all.
    """
    if len({bool(part.absmax_scales) for part in parts}) > 1:
        parts = [replace(p, absmax=maxima(p), absmax_scales=(), absmax_offsets=()) for p in parts]
    return NF4Matrix(
        (sum(part.shape[0] for part in parts), parts[0].shape[1]),
        torch.cat([part.packed for part in parts]),
        torch.cat([part.absmax for part in parts]),
        tuple(scale for part in parts for scale in part.absmax_scales),
        tuple(offset for part in parts for offset in part.absmax_offsets),
        tuple(rows for part in parts for rows in part.rows),
    )


def split(matrix: NF4Matrix) -> list[NF4Matrix]:
    """The modules of a stacked matrix, as views: the inverse of `stack`."""
    fan_in = matrix.shape[1]
    packed = torch.split(matrix.packed, [rows * fan_in // 2 for rows in matrix.rows])
    absmax = torch.split(matrix.absmax, [blocks_of(rows, fan_in) for rows in matrix.rows])
    scales, offsets = matrix.absmax_scales, matrix.absmax_offsets
    return [
        NF4Matrix(
            (rows, fan_in), packed[i], absmax[i], scales[i : i + 1], offsets[i : i + 1], (rows,)
        )
        for i, rows in enumerate(matrix.rows)
    ]


def absmax_float(matrix: NF4Matrix) -> torch.Tensor:
    """The blocks' maxima as float32 [out, in / 64], bit for bit equal to those of bitsandbytes.

    Raises `ValueError` if rows do not consist of whole blocks; `dequantize` has no such limit.
    """
    out, fan_in = matrix.shape
    if fan_in % BLOCK:
        raise ValueError(f"rows of {fan_in} weights do not hold whole blocks of {BLOCK}")
    return maxima(matrix).view(out, fan_in // BLOCK)


def maxima(matrix: NF4Matrix) -> torch.Tensor:
    """The blocks' maxima as float32 [blocks], module after module."""
    return torch.cat([values for _, values in _modules(matrix)])


class Unpack(Protocol):
    """A kernel for `dequantize`: writes the weights of `matrix` to `into` [out * in].

    `into` is float32, or bfloat16 for rounded weights. `maxima` are those of `matrix`.
    """

    def __call__(self, matrix: NF4Matrix, maxima: torch.Tensor, into: torch.Tensor, /) -> None: ...


def dequantize(matrix: NF4Matrix) -> torch.Tensor:
    """The weights, float32 [out, in], bit for bit equal to those of bitsandbytes.

    They are constants for autograd.
    """
    out, fan_in = matrix.shape
    code = nf4_code(matrix.packed.device)
    pairs = torch.cartesian_prod(code, code)  # [256, 2]: the two values of each byte
    weight = torch.empty(out * fan_in, device=matrix.packed.device)
    end = 0
    for packed, maxima in _modules(matrix):
        start, end = end, end + packed.numel() * 2
        values = pairs.index_select(0, packed.int()).view(-1)
        short = -values.numel() % BLOCK
        if short:
            values = torch.nn.functional.pad(values, (0, short))
        scaled = values.view(-1, BLOCK).mul_(maxima[:, None]).view(-1)
        weight[start:end] = scaled[: end - start]
    return weight.view(out, fan_in)


def _modules(matrix: NF4Matrix) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Packed bytes and float32 maxima of each module, flat."""
    for module in split(matrix):
        maxima = module.absmax
        for scales, offset in zip(module.absmax_scales, module.absmax_offsets, strict=True):
            scale = scales.repeat_interleave(NESTED_BLOCK)[: len(maxima)]
            values = dynamic_map().to(maxima.device).index_select(0, maxima.int())
            maxima = values.mul_(scale).add_(offset)
        yield module.packed, maxima
