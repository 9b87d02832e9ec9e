"""Products of bfloat16: values, order of sums, and the software versions of both orders."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
import pytest
import torch
from kernels.conftest import BF16_ISAS, SOFTWARE
from kernels.test_kernels import NF4, pointer, relative_error
from loraplex_model.decoder import layout
from loraplex_model.decoder.layout import CMatrix, Storage
from loraplex_model.ops import build

PAIRS, TILES = 1, 2
FACTOR = np.float32(1.437005043)
"""The constant of PAIRS, as in matmul_bf16.h."""

SUMS = 1e-6
"""Relative error of a float32 sum of these lengths, as for products of float32."""


class Nf4:
    """A random NF4 matrix with a bias, packed for a library."""

    def __init__(self, library: ctypes.CDLL, out: int, fan_in: int) -> None:
        torch.manual_seed(out + fan_in)
        codes = torch.randint(0, 16, (out, fan_in), dtype=torch.uint8)
        absmax = torch.rand(out, fan_in // 64) + 0.1
        scales = absmax.repeat_interleave(64, 1)
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        self.exact = NF4[codes.long()].double() * scales.double()
        if library.loraplex_bf16_order() == TILES:  # what bitsandbytes' dequantisation gives
            self.rounded = (NF4[codes.long()] * scales).bfloat16().double()
        else:
            table = (NF4 * FACTOR).bfloat16().double() / float(FACTOR)
            self.rounded = table[codes.long()] * scales.double()
        panels = layout.nf4_panels(library, packed, absmax, out, fan_in, bf16_products=True)
        self.bias = torch.randn(out)
        self._kept = panels
        self.matrix = CMatrix(
            data=panels[0].data_ptr(),
            absmax=panels[1].data_ptr(),
            bias=self.bias.data_ptr(),
            out=out,
            in_=fan_in,
            kind=Storage.NF4_PACKED,
        )


def multiply(
    library: ctypes.CDLL, matrix: CMatrix, x: torch.Tensor, threads: int = 2
) -> torch.Tensor:
    y = torch.full((x.shape[0], matrix.out), float("nan"))
    library.loraplex_matmul_bf16(byref(matrix), pointer(x), x.shape[0], pointer(y), threads)
    return y


@pytest.mark.parametrize(("out", "fan_in"), [(16, 64), (40, 128), (208, 576), (130, 2112)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 16, 17, 33, 97, 300])
def test_nf4_product_is_that_of_the_rounded_matrix(
    bf16_library: ctypes.CDLL, out: int, fan_in: int, rows: int
) -> None:
    weights = Nf4(bf16_library, out, fan_in)
    x = torch.randn(rows, fan_in)
    y = multiply(bf16_library, weights.matrix, x)
    rounded = x.bfloat16().double() @ weights.rounded.T + weights.bias.double()
    assert relative_error(y, rounded) < SUMS
    # Both factors are rounded to 8 bits, with independent errors of at most 2^-9 each.
    exact = x.double() @ weights.exact.T + weights.bias.double()
    assert relative_error(y, exact) < 2**-8
    for row in {0, rows // 2, rows - 1}:
        alone = multiply(bf16_library, weights.matrix, x[row : row + 1].contiguous(), threads=1)
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "fan_in"), [(1, 16), (17, 48), (512, 81), (300, 576)])
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 37, 100])
def test_dense_product_is_the_matrix_product(
    bf16_library: ctypes.CDLL, dtype: torch.dtype, out: int, fan_in: int, rows: int
) -> None:
    torch.manual_seed(out + rows)
    weight, x = torch.randn(out, fan_in).to(dtype), torch.randn(rows, fan_in)
    if dtype == torch.bfloat16:
        panels, kind = layout.packed_panels(bf16_library, weight), Storage.BF16_PACKED
    else:
        panels, kind = layout.dense_panels(weight), Storage.F32
    matrix = CMatrix(data=panels.data_ptr(), out=out, in_=fan_in, kind=kind)
    y = multiply(bf16_library, matrix, x)
    assert relative_error(y, x.bfloat16().double() @ weight.double().T) < SUMS
    alone = multiply(bf16_library, matrix, x[-1:].contiguous())
    assert torch.equal(alone[0], y[-1])


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_instructions_give_the_bits_of_the_software_version(isa: str) -> None:
    hardware = build.load(isa)
    software = build.load(*SOFTWARE[hardware.loraplex_bf16_order() - 1])
    assert software.loraplex_bf16_order() == hardware.loraplex_bf16_order()
    torch.manual_seed(3)
    x = torch.randn(21, 576)
    ours, theirs = Nf4(hardware, 80, 576), Nf4(software, 80, 576)
    got = multiply(hardware, ours.matrix, x)
    assert torch.equal(got, multiply(software, theirs.matrix, x))
    weight = torch.randn(80, 576).bfloat16()
    results = []
    for library in (hardware, software):
        panels = layout.packed_panels(library, weight)
        matrix = CMatrix(data=panels.data_ptr(), out=80, in_=576, kind=Storage.BF16_PACKED)
        results.append(multiply(library, matrix, x))
    assert torch.equal(*results)


def test_the_order_of_pairs_adds_the_odd_product_first(bf16_library: ctypes.CDLL) -> None:
    # 2^24 + 1 is 2^24 in float32, so the sum shows which products were added to it one by one.
    x = torch.zeros(1, 32)
    x[0, :4] = 1
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([1.0, 2.0**24, 1.0, 1.0])
    panels = layout.packed_panels(bf16_library, weight.bfloat16())
    matrix = CMatrix(data=panels.data_ptr(), out=1, in_=32, kind=Storage.BF16_PACKED)
    got = multiply(bf16_library, matrix, x)[0, 0].item()
    in_pairs = 2.0**24  # the odd product comes first, and each 1 is lost
    in_tiles = 2.0**24 + 2  # the even products are a chain of their own, and only the odd 1 is lost
    assert got == (in_pairs if bf16_library.loraplex_bf16_order() == PAIRS else in_tiles)
