"""Products with NF4 weights, which are decoded in registers, and unpacking to a dense matrix.

A product computes out^T = W x^T, tile by tile: the decoded weights are the left operand, which
tensor cores take from registers, so a decoded weight is never written to memory. A weight is

    value[code] * (level[absmax byte] * scale + offset)

in float32 with one rounding for each operation, then rounded once to the compute dtype, so it has
the bits of `nf4.dequantize(...).to(dtype)`. The launches forbid fused multiply-add, which would
leave out a rounding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
import triton
import triton.language as tl

from loraplex_model.base.weights import BLOCK
from loraplex_model.decoder.cuda.kernels.common import (
    INTERPRETED,
    TARGETS,
    TYPES,
    Compilation,
    product_precision,
    product_type,
    rounded,
)
from loraplex_model.decoder.cuda.pack import TILE, DeviceMatrix
from loraplex_model.decoder.cuda.tilings import Scratch, Tiling, tilings
from loraplex_model.ops import nf4

BYTES: tl.constexpr = tl.constexpr(BLOCK // 2)
ROWS: tl.constexpr = tl.constexpr(TILE)
_EMULATED: tl.constexpr = tl.constexpr(INTERPRETED)


def decode_ptx() -> str:
    """PTX that turns four bytes ($8) into the values of their low ($0-$3) and high codes ($4-$7).

    Lane l of a warp holds value l % 16, and a code names the lane to read from: the segments of
    16 lanes (0x101f) ignore all bits of an index above the fourth. A look-up thereby costs one
    shift and one shuffle, and works on registers in any layout, such as that of tensor cores.
    The values are selected by `%tid.x` and not by `%laneid`, since the compiler knows the former
    to be constant, and moves the selection out of loops. Blocks of threads have one dimension.
    """
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] for value in nf4.nf4_code().tolist()]
    lines = [".reg .u32 lane, held, code;", ".reg .pred here;"]
    lines += ["mov.u32 lane, %tid.x;", "and.b32 lane, lane, 15;", f"mov.b32 held, {bits[0]};"]
    for lane in range(1, 16):
        lines += [f"setp.eq.u32 here, lane, {lane};", f"selp.b32 held, {bits[lane]}, held, here;"]
    for number in range(8):
        shift = 8 * (number % 4) + 4 * (number // 4)
        lines += [
            f"shr.u32 code, $8, {shift};",
            f"shfl.sync.idx.b32 ${number}, held, code, 0x101f, 0xffffffff;",
        ]
    return "\n".join(["{", *lines, "}"])


_DECODE: tl.constexpr = tl.constexpr(decode_ptx())
_REGISTERS: tl.constexpr = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")


@triton.jit
def _maximum(raw, scale, offset, levels, NESTED: tl.constexpr):
    """The float32 maximum of a block from its stored form."""
    if NESTED:
        return tl.load(levels + raw.to(tl.int32)) * scale + offset
    else:
        return raw


@triton.jit
def _halves(byte, maximum, values, BN: tl.constexpr):
    """Float32 weights [BN, 32] of the low and of the high codes of bytes [BN, 32]."""
    if _EMULATED:  # the interpreter has no inline assembly
        table = tl.broadcast_to(tl.load(values + tl.arange(0, 16))[None, :], (BN, 16))
        low = tl.gather(table, (byte & 15).to(tl.int32), 1)
        high = tl.gather(table, (byte >> 4).to(tl.int32), 1)
    else:
        low, high = tl.inline_asm_elementwise(
            _DECODE, _REGISTERS, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    return low * maximum[:, None], high * maximum[:, None]


@triton.jit
def _sum_over_blocks(
    at_code, at_maximum, at_x, wanted, count, start, offset, scales, levels, values,
    BN: tl.constexpr, BM: tl.constexpr, UNROLL: tl.constexpr, NESTED: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum [BN, BM] over `count` blocks from the given addresses on."""
    acc = tl.zeros((BN, BM), tl.float32)
    # A byte of a maximum is the address of its level, so it is loaded one block ahead: a load that
    # waits for another one would hold up every step of the loop.
    raw = tl.load(at_maximum, mask=count > 0, other=0)
    for step in range(count // UNROLL):
        for unrolled in tl.static_range(UNROLL):
            b = step * UNROLL + unrolled
            at_maximum += ROWS
            ahead = tl.load(at_maximum, mask=b + 1 < count, other=0)
            scale = offset
            if NESTED:
                scale = tl.load(scales + ((start + b) >> 8))
            maximum = _maximum(raw, scale, offset, levels, NESTED)
            low, high = _halves(tl.load(at_code), maximum, values, BN)
            left = tl.load(at_x, mask=wanted, other=0.0)
            right = tl.load(at_x + BYTES, mask=wanted, other=0.0)
            acc = tl.dot(low.to(DT), left.to(DT), acc, input_precision=PRECISION)
            acc = tl.dot(high.to(DT), right.to(DT), acc, input_precision=PRECISION)
            raw = ahead
            at_code += ROWS * BYTES
            at_x += 2 * BYTES
    return acc


@triton.jit
def _sum_of_all(acc, partials, arrivals, splits, BN: tl.constexpr, BM: tl.constexpr):
    """The sum [BN, BM] over the programs that share a tile, for the one that arrives last.

    Each writes its partial sum, and the last adds them in the order of z, so the result does not
    depend on which it is. Returns zeros and False to the others.
    """
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    first = partials + number.to(tl.int64) * splits * (BN * BM) + within
    tl.store(first + tl.program_id(2) * (BN * BM), acc)
    # The barrier puts the stores of all threads before the atomic operation of one of them, whose
    # release makes them visible to the program that arrives last; its acquire and the barrier
    # after it put that program's reads behind them. `.cg` reads from the L2 cache: a line in the
    # L1 cache could be older.
    tl.debug_barrier()
    before = tl.atomic_add(arrivals + number, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    is_last = before == splits - 1
    total = tl.zeros((BN, BM), tl.float32)
    if is_last:
        for z in range(splits):
            total += tl.load(first + z * (BN * BM), cache_modifier=".cg")
        tl.store(arrivals + number, 0)
    return total, is_last


@triton.jit(do_not_specialize=["T", "N", "blocks", "span", "splits"])
def multiply_kernel(
    x,
    out,
    codes,
    absmax,
    starts,
    scales,
    offsets,
    levels,
    values,
    bias,
    partials,
    arrivals,
    T,
    N,
    blocks,
    span,
    splits,
    x_stride,
    out_stride,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SHARED: tl.constexpr,
    UNROLL: tl.constexpr,
    NESTED: tl.constexpr,
    BIASED: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BN, BM] of out^T, over blocks [z * span, (z + 1) * span) of the input.

    SHARED: `splits` programs share the input of a tile. `arrivals` holds a zero for every tile
    before and after the launch.
    """
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * span
    last = tl.minimum(first + span, blocks)
    j = tl.arange(0, BYTES)
    tile = (n // ROWS).to(tl.int64) * blocks + first
    at_code = codes + tile[:, None] * (ROWS * BYTES) + ((n % ROWS) * BYTES)[:, None] + j[None, :]
    at_maximum = absmax + tile * ROWS + n % ROWS
    at_x = x + m.to(tl.int64)[None, :] * x_stride + first * (2 * BYTES) + j[:, None]
    wanted = m[None, :] < T
    start = tl.load(starts + n) + first
    offset = tl.load(offsets + n)
    acc = _sum_over_blocks(
        at_code, at_maximum, at_x, wanted, last - first, start, offset, scales, levels, values,
        BN, BM, UNROLL, NESTED, DT, PRECISION,
    )  # fmt: skip
    at_out = out + m.to(tl.int64)[None, :] * out_stride + n[:, None]
    stored = (n < N)[:, None] & wanted
    if SHARED:
        acc, is_last = _sum_of_all(acc, partials, arrivals, splits, BN, BM)
        stored = stored & is_last
    if BIASED:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(at_out, rounded(acc, out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["N", "blocks"])
def unpack_kernel(
    out,
    codes,
    absmax,
    starts,
    scales,
    offsets,
    levels,
    values,
    N,
    blocks,
    out_stride,
    BN: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Weights [BN, 64] of one block for each row, rounded to the type of `out`."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    b = tl.program_id(0)
    j = tl.arange(0, BYTES)
    tile = (n // ROWS).to(tl.int64) * blocks + b
    at_code = codes + tile[:, None] * (ROWS * BYTES) + ((n % ROWS) * BYTES)[:, None] + j[None, :]
    raw = tl.load(absmax + tile * ROWS + n % ROWS)
    offset = tl.load(offsets + n)
    scale = offset
    if NESTED:
        scale = tl.load(scales + ((tl.load(starts + n) + b) >> 8))
    maximum = _maximum(raw, scale, offset, levels, NESTED)
    low, high = _halves(tl.load(at_code), maximum, values, BN)
    at = out + n.to(tl.int64)[:, None] * out_stride + b * (2 * BYTES) + j[None, :]
    stored = (n < N)[:, None]
    tl.store(at, rounded(low, out.dtype.element_ty), mask=stored)
    tl.store(at + BYTES, rounded(high, out.dtype.element_ty), mask=stored)


def multiply(
    matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor, tiling: Tiling, scratch: Scratch
) -> None:
    """Writes `x @ W.T + bias` to `out`. x [T, in] and out [T, out] have contiguous rows."""
    rows, (fan_out, fan_in) = len(x), matrix.shape
    assert x.stride(1) == out.stride(1) == 1, "rows are contiguous"
    assert (*x.shape, *out.shape) == (rows, fan_in, rows, fan_out)
    if not rows:
        return
    grid = tiling.grid(matrix.shape, rows)
    if tiling.split > 1:
        assert grid[0] * grid[1] <= len(scratch.arrivals)
        assert grid[0] * grid[1] * tiling.split * tiling.out_tile * tiling.row_tile <= len(
            scratch.partials
        )
    blocks = fan_in // BLOCK
    multiply_kernel[grid](
        x,
        out,
        matrix.codes,
        matrix.absmax,
        matrix.starts,
        matrix.scales,
        matrix.offsets,
        matrix.levels,
        matrix.values,
        out if matrix.bias is None else matrix.bias,
        scratch.partials,
        scratch.arrivals,
        rows,
        fan_out,
        blocks,
        -(-blocks // tiling.split),
        tiling.split,
        x.stride(0),
        out.stride(0),
        BN=tiling.out_tile,
        BM=tiling.row_tile,
        SHARED=tiling.split > 1,
        UNROLL=tiling.unroll,
        NESTED=matrix.is_nested,
        BIASED=matrix.bias is not None,
        DT=product_type(x.dtype),
        PRECISION=product_precision(x.dtype),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=False,
    )


def unpack(matrix: DeviceMatrix, out: torch.Tensor) -> None:
    """Writes the weights to `out` [out, in], rounded once to its type."""
    assert out.shape == matrix.shape
    assert out.stride(1) == 1
    if matrix.dense is not None:
        out.copy_(matrix.dense)
        return
    blocks = matrix.shape[1] // BLOCK
    unpack_kernel[(blocks, len(matrix.codes))](
        out,
        matrix.codes,
        matrix.absmax,
        matrix.starts,
        matrix.scales,
        matrix.offsets,
        matrix.levels,
        matrix.values,
        matrix.shape[0],
        blocks,
        out.stride(0),
        BN=TILE,
        NESTED=matrix.is_nested,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )


_POINTERS: Mapping[str, str] = {
    "codes": "*u8",
    "starts": "*i32",
    **dict.fromkeys(("scales", "offsets", "levels", "values"), "*fp32"),
}

_SHAPES: Sequence[tuple[int, int]] = (
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    *((960, 576), (576, 576), (3072, 576), (576, 1536)),
)


def compilations() -> list[Compilation]:
    """The configurations for Llama-3.1-8B and SmolLM2-135M on 132 multiprocessors."""
    found: dict[str, Compilation] = {}
    for dtype, number in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        for nested in (True, False):
            pointers = {**_POINTERS, "absmax": "*u8" if nested else "*fp32", "out": number}
            name = f"nf4_unpack {number} nested {nested}"
            found[name] = Compilation(
                unpack_kernel,
                name,
                {**pointers, "N": "i32", "blocks": "i32", "out_stride": "i32"},
                {"BN": TILE, "NESTED": nested},
                num_stages=1,
                is_fused=False,
            )
            for tiling, targets in _chosen(dtype).items():
                built = _compilation(tiling, dtype, number, pointers, nested)
                found[built.name] = replace(built, targets=targets)
    return list(found.values())


def _chosen(dtype: torch.dtype) -> Mapping[Tiling, tuple[int, ...]]:
    """The tilings of all shapes and the targets that use them; all splits are one kernel."""
    found: dict[Tiling, dict[int, None]] = {}
    for target, shape, rows in product(TARGETS, _SHAPES, (16, 32, 64, 128)):
        for tiling in tilings(shape, rows, dtype, 132, target // 10):
            found.setdefault(replace(tiling, split=min(2, tiling.split)), {})[target] = None
    return {each: (*found[each],) for each in sorted(found, key=lambda each: each.name)}


def _compilation(
    shared: Tiling, dtype: torch.dtype, number: str, pointers: Mapping[str, str], nested: bool
) -> Compilation:
    return Compilation(
        multiply_kernel,
        f"{shared.name} {number} nested {nested}",
        {
            **pointers,
            **dict.fromkeys(("x", "bias"), number),
            "partials": "*fp32",
            "arrivals": "*i32",
            **dict.fromkeys(
                ("T", "N", "blocks", "span", "splits", "x_stride", "out_stride"), "i32"
            ),
        },
        {
            "BN": shared.out_tile,
            "BM": shared.row_tile,
            "SHARED": shared.split > 1,
            "UNROLL": shared.unroll,
            "NESTED": nested,
            "BIASED": False,
            "DT": TYPES[dtype],
            "PRECISION": product_precision(dtype),
        },
        num_warps=shared.warps,
        num_stages=shared.stages,
        is_hot=True,
        is_fused=False,
    )
