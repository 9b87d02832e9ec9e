"""Elementwise steps of training equal the formulas in float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from loraplex_model.ops import elementwise
from loraplex_model.ops.build import Kernels

WIDTHS = [1, 7, 16, 45, 576]
ROWS = 5


@pytest.fixture(autouse=True)
def _kernels(library: Kernels) -> Iterator[None]:
    with mock.patch.object(elementwise, "_library", return_value=library):
        yield


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight, gradient = draw(ROWS, width), draw(width, seed=1), draw(ROWS, width, seed=2)
    wide = x.double().requires_grad_()
    wanted = torch.nn.functional.rms_norm(wide, (width,), weight.double(), 1e-5)
    found, scale = elementwise.rms_norm(x, weight, 1e-5)
    close(found, wanted.detach())
    assert scale.shape == (ROWS, 1)
    assert torch.equal(elementwise.scaled(x, scale, weight), found), "made again, to the bit"
    wanted.backward(gradient.double())
    back = elementwise.rms_norm_backward(x, scale, weight, gradient)
    assert wide.grad is not None
    # At one number a row, all of the gradient cancels.
    torch.testing.assert_close(back.double(), wide.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(width: int) -> None:
    gate_up, gradient = 4 * draw(ROWS, 2 * width), draw(ROWS, width, seed=1)
    gate_up[0, 0], gate_up[1, 0] = 200.0, -200.0  # where the exponential would overflow
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    close(elementwise.silu_mul(gate_up), wanted.detach())
    wanted.backward(gradient.double())
    assert wide.grad is not None
    close(elementwise.silu_mul_backward(gate_up, gradient), wide.grad)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = draw(ROWS, 40), draw(40, seed=1)
    x[2, 3] = torch.nan
    found, _ = elementwise.rms_norm(x, weight, 1e-5)
    assert found.isfinite().all(1).tolist() == [True, True, False, True, True]
    gated = elementwise.silu_mul(x)
    assert gated.isfinite().all(1).tolist() == [True, True, False, True, True]
    back = elementwise.silu_mul_backward(x, draw(ROWS, 20))
    assert back.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_what_can_be_given() -> None:
    x = draw(4, 8)
    assert elementwise.usable(x, x[:2])
    assert not elementwise.usable(x.double())
    assert not elementwise.usable(x.T)
    with mock.patch.object(elementwise, "_library", return_value=None):
        assert not elementwise.usable(x)
