"""The kernel that unpacks NF4 for training gives the very bits of the reference, and of
bitsandbytes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from loraplex_model.ops import build, nf4, unpack
from loraplex_model.ops.build import Kernels


@pytest.mark.parametrize("shapes", [[(96, 128)], [(9, 80), (5, 80), (1, 80)], [(3, 2)]])
def test_bits(library: Kernels, shapes: list[tuple[int, int]]) -> None:
    """Also where blocks cross the ends of rows, end early, or begin anew with a module."""
    chance = torch.Generator().manual_seed(0)
    matrix = nf4.stack([nf4.quantise(torch.randn(shape, generator=chance)) for shape in shapes])
    out = torch.full((matrix.shape[0] * matrix.shape[1] + 1,), 7.0)
    with mock.patch.object(build, "load", return_value=library):
        kernel = unpack.kernel()
    assert kernel is not None
    kernel(matrix, nf4.maxima(matrix), out)
    assert torch.equal(out[:-1].view(matrix.shape), nf4.dequantize(matrix))
    assert out[-1] == 7.0, "nothing is written behind the end"


def test_bits_of_bitsandbytes(library: Kernels) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(1))
    wanted = bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    )
    matrix = nf4.quantise(weight)
    out = torch.empty(weight.numel())
    with mock.patch.object(build, "load", return_value=library):
        kernel = unpack.kernel()
    assert kernel is not None
    kernel(matrix, nf4.maxima(matrix), out)
    assert torch.equal(out.view(weight.shape), wanted)


def test_no_compiler_is_no_kernel_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    missing = build.KernelsUnavailable("no C++ compiler found")
    with mock.patch.object(build, "load", side_effect=missing):
        assert unpack.kernel() is None
    assert "no C++ compiler found" in caplog.text
