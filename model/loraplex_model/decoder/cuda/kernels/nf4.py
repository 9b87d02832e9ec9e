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
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from loraplex_model.base.weights import BLOCK
from loraplex_model.decoder.cuda.kernels.common import (
    INTERPRETED,
    TYPES,
    Compilation,
    product_precision,
    product_type,
    rounded,
)
from loraplex_model.decoder.cuda.pack import TILE, DeviceMatrix
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

    SHARED: `splits` programs share the input of a tile. Each writes its partial sum, and the one
    that arrives last adds them in the order of z, so the result does not depend on which it is.
    `arrivals` holds a zero for every tile before and after the launch.
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
    acc = tl.zeros((BN, BM), tl.float32)
    count = last - first
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
    stored = (n < N)[:, None] & wanted
    at_out = out + m.to(tl.int64)[None, :] * out_stride + n[:, None]
    if BIASED:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if not SHARED:
        if BIASED:
            acc += shift
        tl.store(at_out, rounded(acc, out.dtype.element_ty), mask=stored)
    else:
        number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        mine = partials + number.to(tl.int64) * splits * (BN * BM) + within
        tl.store(mine + tl.program_id(2) * (BN * BM), acc)
        # The barrier puts the stores of all threads before the atomic operation of one of them,
        # whose release makes them visible to the program that arrives last; its acquire and the
        # barrier after it put that program's reads behind them. `.cg` reads from the L2 cache: a
        # line in the L1 cache could be older.
        tl.debug_barrier()
        before = tl.atomic_add(arrivals + number, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if before == splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for z in range(splits):
                total += tl.load(mine + z * (BN * BM), cache_modifier=".cg")
            if BIASED:
                total += shift
            tl.store(at_out, rounded(total, out.dtype.element_ty), mask=stored)
            tl.store(arrivals + number, 0)


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


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut into programs.

    Attributes:
        out_tile: weight rows of a program: 64, 128 or 256, and a divisor of the padded rows.
        row_tile: activation rows of a program, a power of two from 16.
        split: programs that share the input dimension of a tile.
        unroll: blocks of 64 inputs in one step of the loop; divides those of every program.
        warps, stages: of Triton.
    """

    out_tile: int
    row_tile: int
    split: int = 1
    unroll: int = 1
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        """Name in reports and in the file of timings."""
        shape = f"{self.out_tile}x{self.row_tile}"
        return f"nf4 {shape} split {self.split} unroll {self.unroll} w{self.warps} s{self.stages}"

    def grid(self, shape: tuple[int, int], rows: int) -> tuple[int, int, int]:
        """Programs along the rows, along the outputs, and along the input."""
        return -(-rows // self.row_tile), -(-shape[0] // self.out_tile), self.split


_FAMILIES: Mapping[int, Sequence[Tiling]] = {
    16: (
        Tiling(64, 16, unroll=2),
        Tiling(128, 16, unroll=2),
        Tiling(64, 16, unroll=4, stages=4),
    ),
    32: (
        Tiling(64, 32, unroll=2),
        Tiling(128, 32, unroll=2, warps=8),
    ),
    64: (
        Tiling(128, 64, unroll=2, warps=8),
        Tiling(64, 64, unroll=2),
        Tiling(256, 64, warps=8),
    ),
    128: (
        Tiling(128, 128, unroll=2, warps=8),
        Tiling(128, 128, warps=8),
        Tiling(64, 128),
    ),
}
"""Configurations by their activation rows, without the split. None spills registers, on compute
capability 8.0, 9.0 or 12.0; with 256 activation rows all do outside 9.0."""

_PROGRAMS = 3
"""Programs for each multiprocessor that keep enough reads in flight: a program has 4 to 8 KiB on
the way, and 3 TB/s at a latency of 0.8 microseconds are 18 KiB on each of 132 multiprocessors."""

_MOST_SPLITS = 16


def tilings(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, processors: int
) -> Sequence[Tiling]:
    """Configurations for a product of `rows` rows; without a measurement, the first is taken.

    They depend on the tile that holds `rows`, not on `rows` itself.
    """
    row_tile = min(max(_FAMILIES), max(min(_FAMILIES), 1 << (rows - 1).bit_length()))
    families = _FAMILIES[row_tile]
    if dtype == torch.float32:  # no tensor cores: each thread needs registers for both operands
        row_tile = min(row_tile, 32)
        families = (Tiling(64, row_tile),)
    padded, blocks = shape[0] + -shape[0] % TILE, shape[1] // BLOCK
    found: dict[Tiling, None] = {}
    for family in families:
        if padded % family.out_tile:
            continue
        programs = padded // family.out_tile * -(-rows // row_tile)
        split = 1
        while split < _MOST_SPLITS and programs * split < _PROGRAMS * processors:
            split *= 2
        for each in (split, split // 2, split * 2):
            if 1 <= each <= min(_MOST_SPLITS, max(1, blocks // 4)):
                found[_fitted(family, each, blocks)] = None
        if not found:
            found[_fitted(family, max(1, blocks // 8), blocks)] = None
    return list(found)


def _fitted(family: Tiling, split: int, blocks: int) -> Tiling:
    unroll = family.unroll
    while blocks % (split * unroll):
        unroll //= 2
        if unroll <= 1:
            return replace(family, split=split, unroll=1)
    return replace(family, split=split, unroll=unroll)


@dataclass(frozen=True, slots=True, eq=False)
class Scratch:
    """Device memory of products with a split input. Used by one stream at a time.

    Attributes:
        partials: float32, sums of the programs of every tile.
        arrivals: int32, for every tile the number of programs that are done; zero between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def for_launches(
        cls, launches: Sequence[tuple[Tiling, tuple[int, int], int]], device: torch.device | str
    ) -> Scratch:
        """Memory for the largest of launches, each a tiling, a shape and a number of rows."""
        sums, tiles = 1, 1
        for tiling, shape, rows in launches:
            if tiling.split > 1:
                across, along, split = tiling.grid(shape, rows)
                tiles = max(tiles, across * along)
                sums = max(sums, across * along * split * tiling.out_tile * tiling.row_tile)
        return cls(
            torch.zeros(sums, dtype=torch.float32, device=device),
            torch.zeros(tiles, dtype=torch.int32, device=device),
        )


def multiply(
    matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor, tiling: Tiling, scratch: Scratch
) -> None:
    """Writes `x @ W.T + bias` to `out`. x [T, in] and out [T, out] have contiguous rows."""
    rows, (fan_out, fan_in) = len(x), matrix.shape
    assert x.stride(1) == out.stride(1) == 1, "rows are contiguous"
    assert out.shape == (rows, fan_out)
    assert x.shape[1] == fan_in
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
    "scales": "*fp32",
    "offsets": "*fp32",
    "levels": "*fp32",
    "values": "*fp32",
}

_SHAPES: Sequence[tuple[int, int]] = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
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
            chosen = {
                tiling
                for shape in _SHAPES
                for rows in (16, 32, 64, 128)
                for tiling in tilings(shape, rows, dtype, 132)
            }
            for tiling in sorted(chosen, key=lambda each: each.name):
                built = _compilation(tiling, dtype, number, pointers, nested)
                found[built.name] = built
    return list(found.values())


def _compilation(
    tiling: Tiling, dtype: torch.dtype, number: str, pointers: Mapping[str, str], nested: bool
) -> Compilation:
    shared = replace(tiling, split=min(2, tiling.split))  # the kernel knows only whether it is cut
    return Compilation(
        multiply_kernel,
        f"{shared.name} {number} nested {nested}",
        {
            **pointers,
            **dict.fromkeys(("x", "bias"), number),
            "partials": "*fp32",
            "arrivals": "*i32",
            **dict.fromkeys(("T", "N", "blocks", "span", "splits"), "i32"),
            **dict.fromkeys(("x_stride", "out_stride"), "i32"),
        },
        {
            "BN": tiling.out_tile,
            "BM": tiling.row_tile,
            "SHARED": tiling.split > 1,
            "UNROLL": tiling.unroll,
            "NESTED": nested,
            "BIASED": False,
            "DT": TYPES[dtype],
            "PRECISION": product_precision(dtype),
        },
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        is_hot=True,
        is_fused=False,
    )
