"""The NF4 kernels compute what float64 arithmetic on the unpacked weights gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.decoder.cuda.choices import Shape
from loraplex_model.decoder.cuda.kernels import nf4 as kernels
from loraplex_model.decoder.cuda.pack import DeviceMatrix, pack_matrix
from loraplex_model.decoder.cuda.products import Products
from loraplex_model.decoder.cuda.tilings import Scratch, Tiling
from loraplex_model.ops import nf4

BF16, F32 = torch.bfloat16, torch.float32
BOUND = {BF16: 4e-3, F32: 1e-6}
"""Relative errors: bfloat16 results are rounded once, by up to 2^-9 each."""


def stacked(rows: tuple[int, ...], fan_in: int, *, nested: bool = True) -> NF4Matrix:
    random = torch.Generator().manual_seed(sum(rows) * fan_in)
    parts = [
        nf4.quantise(torch.randn(count, fan_in, generator=random) * 0.02 * (n + 1))
        for n, count in enumerate(rows)
    ]
    matrix = nf4.stack(parts)
    if nested:
        return matrix
    return replace(matrix, absmax=nf4.maxima(matrix), absmax_scales=(), absmax_offsets=())


def inputs(rows: int, fan_in: int, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows)
    return torch.randn(rows, fan_in, generator=random).to(dtype)


def expected(matrix: NF4Matrix, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    result = x.double() @ nf4.dequantize(matrix).double().T
    return result if bias is None else result + bias.to(x.dtype).double()


def product(packed: DeviceMatrix, x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """The product into the left part of a wider poisoned tensor, whose rest stays as it is."""
    rows, width = len(x), packed.shape[0]
    whole = torch.full((rows + 3, width + 5), torch.nan, dtype=x.dtype)
    scratch = Scratch.for_launches([(tiling, packed.shape, rows)], "cpu")
    scratch.partials.fill_(torch.nan)
    kernels.multiply(packed, x, whole[:rows, :width], tiling, scratch)
    assert not scratch.arrivals.any()
    assert whole[rows:].isnan().all()
    assert whole[:, width:].isnan().all()
    return whole[:rows, :width]


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


CASES = [
    ((128, 64), 576, 3, Tiling(64, 16)),  # the hidden width of SmolLM2: 9 blocks
    ((64,), 1536, 1, Tiling(64, 16, split=4, unroll=2)),
    ((70, 30), 192, 17, Tiling(64, 16)),  # neither module fills tiles
    ((70, 30), 192, 64, Tiling(128, 64, split=2)),  # more outputs in a tile than there are
    ((1,), 64, 16, Tiling(64, 16)),
    ((192,), 256, 200, Tiling(64, 128, unroll=4)),
    ((256,), 320, 17, Tiling(256, 32, split=4)),  # the fourth program has no block left
]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("rows", "fan_in", "count", "tiling"), CASES, ids=str)
def test_products(
    rows: tuple[int, ...], fan_in: int, count: int, tiling: Tiling, dtype: torch.dtype
) -> None:
    matrix = stacked(rows, fan_in)
    bias = torch.linspace(-1, 1, sum(rows))
    x = inputs(count, fan_in, dtype)
    for given in (None, bias):
        packed = pack_matrix(matrix, given, "cpu", dtype=dtype)
        result = product(packed, x, tiling)
        assert error(result, expected(matrix, given, x)) < BOUND[dtype]
    assert torch.equal(result, product(packed, x, tiling)), "the same inputs give the same bits"


@pytest.mark.parametrize("tiling", [Tiling(64, 16), Tiling(64, 32, split=4)], ids=str)
def test_a_row_does_not_depend_on_the_others(tiling: Tiling) -> None:
    packed = pack_matrix(stacked((100,), 256), None, "cpu")
    x = inputs(19, 256, BF16)
    together = product(packed, x, tiling)
    for row in (0, 15, 16, 18):
        assert torch.equal(product(packed, x[row : row + 1], tiling)[0], together[row])
    spoiled = x.clone()
    spoiled[3] = torch.nan
    others = [row for row in range(19) if row != 3]
    assert torch.equal(product(packed, spoiled, tiling)[others], together[others])


def test_maxima_that_were_quantised_once() -> None:
    matrix = stacked((64, 33), 192, nested=False)
    packed = pack_matrix(matrix, None, "cpu", dtype=F32)
    x = inputs(5, 192, F32)
    assert error(product(packed, x, Tiling(64, 16, split=2)), expected(matrix, None, x)) < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "fan_in"), [((70, 30), 192), ((64, 3), 576), ((33, 20), 48)])
def test_unpacked_weights_have_the_bits_of_the_reference(
    rows: tuple[int, ...], fan_in: int, nested: bool, dtype: torch.dtype
) -> None:
    matrix = stacked(rows, fan_in, nested=nested)
    whole = torch.full((sum(rows) + 1, fan_in + 8), torch.nan, dtype=dtype)
    kernels.unpack(pack_matrix(matrix, None, "cpu", dtype=dtype), whole[:-1, :fan_in])
    assert torch.equal(whole[:-1, :fan_in], nf4.dequantize(matrix).to(dtype))
    assert whole[-1].isnan().all()
    assert whole[:, fan_in:].isnan().all()


def test_the_look_up_gives_the_values_of_all_bytes() -> None:
    """The interpreter cannot run the PTX, so a few lines here do, for the 32 lanes of a warp."""
    values = nf4.nf4_code()
    for start in range(0, 256, 4):
        number = int.from_bytes(range(start, start + 4), "little")
        low_and_high = run_ptx(kernels.decode_ptx(), number)
        codes = [byte & 15 for byte in range(start, start + 4)]
        codes += [byte >> 4 for byte in range(start, start + 4)]
        bits = values[codes].view(torch.int32).tolist()
        assert all([int32(each) for each in lane] == bits for lane in low_and_high)


def int32(bits: int) -> int:
    return bits - (bits >> 31 << 32)


def run_ptx(text: str, packed: int) -> list[list[int]]:
    """$0 to $7 of each lane, by the definitions of the instructions in the manual of PTX."""
    lanes = [{"$8": packed, "%tid.x": 96 + lane} for lane in range(32)]
    for line in text.strip("{}\n").split("\n"):
        name, _, operands = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        to, *given = operands.split(", ")
        read = [
            [int(each) if each[0].isdigit() and "x" not in each else each for each in given]
            for _ in lanes
        ]
        args = [[lane.get(a, a) for a in each] for lane, each in zip(lanes, read, strict=True)]
        for index, lane in enumerate(lanes):
            a = args[index]
            match name:
                case "mov.u32" | "mov.b32":
                    lane[to] = a[0]
                case "and.b32":
                    lane[to] = a[0] & a[1]
                case "shr.u32":
                    lane[to] = a[0] >> a[1]
                case "setp.eq.u32":
                    lane[to] = a[0] == a[1]
                case "selp.b32":
                    lane[to] = a[0] if a[2] else a[1]
                case "shfl.sync.idx.b32":
                    clamp, segment = int(a[2], 16) & 31, int(a[2], 16) >> 8 & 31
                    source = (index & segment) | (a[1] & 31 & ~segment)
                    assert source <= (index & segment) | (clamp & ~segment)
                    lane[to] = args[source][0]
                case _:
                    raise AssertionError(name)
    return [[lane[f"${n}"] for n in range(8)] for lane in lanes]


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 200])
def test_products_without_a_clock_take_our_kernel(rows: int) -> None:
    matrices = [stacked((96, 40), 128), stacked((96,), 80)]
    packed = [pack_matrix(each, torch.ones(sum(each.rows)), "cpu") for each in matrices]
    products = Products(packed, BF16, most_rows=64)
    for matrix, device_matrix in zip(matrices, packed, strict=True):
        x = inputs(rows, matrix.shape[1], BF16)
        out = torch.full((rows, matrix.shape[0]), torch.nan, dtype=BF16)
        products.multiply(device_matrix, x, out)
        assert error(out, expected(matrix, torch.ones(matrix.shape[0]), x)) < BOUND[BF16]
    assert [each.rows for each in products.report()] == [1, 2, 4, 8, 16, 32, 64]
    assert all(re.match("nf4 ", *each.chosen) for each in products.report())


def test_the_fastest_candidate_is_used() -> None:
    """A clock says that a dense copy is fastest from 16 rows on, and there is memory for one."""
    matrix = stacked((64,), 64)
    packed = [pack_matrix(matrix, None, "cpu", dtype=F32) for _ in range(2)]

    def clock(candidate: str, shape: Shape, rows: int, run: Callable[[], None]) -> float:
        return 10.0 if candidate != "dense" else 160.0 / rows - 0.5

    products = Products(packed, F32, most_rows=64, copy_bytes=64 * 64 * 4 + 1, measure=clock)
    chosen = {each.rows: dict(each.chosen) for each in products.report()}
    ours = next(iter(chosen[1]))
    assert chosen[8] == {ours: 2}
    assert chosen[64].pop("dense") == 1
    assert sum(chosen[64].values()) == 1
    x = inputs(32, 64, F32)
    for each in packed:
        out = torch.full((32, 64), torch.nan)
        products.multiply(each, x, out)
        assert error(out, expected(matrix, None, x)) < BOUND[F32]


def test_a_device_on_which_no_kernel_works_is_refused() -> None:
    def clock(candidate: str, shape: Shape, rows: int, run: Callable[[], None]) -> float:
        if candidate != "dense":
            raise RuntimeError("out of resources")
        return 1.0

    packed = [pack_matrix(stacked((64,), 64), None, "cpu")]
    with pytest.raises(RuntimeError, match="no NF4 kernel"):
        Products(packed, BF16, most_rows=4, measure=clock)
