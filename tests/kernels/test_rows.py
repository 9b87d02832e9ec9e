"""Norms, rotations and activations of single rows give what their formulas give in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_void_p

import pytest
import torch
from loraplex_model.adapters.delta import Activation

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 3, 16, 37, 576]
ROWS = 5


def pointer(tensor: torch.Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def ulps(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error in units of the last place of the float32 nearest to `wanted`."""
    assert found.isfinite().all()
    nearest = wanted.abs().float().clamp_min(torch.finfo(torch.float32).tiny)
    place = torch.nextafter(nearest, torch.tensor(float("inf"))).double() - nearest.double()
    return float(((found.double() - wanted).abs() / place).max())


def everywhere(low: float, high: float) -> torch.Tensor:
    """Numbers of all sizes in a range; an odd count, so that some are in no whole vector."""
    small = torch.logspace(-30, 0, 4001)
    between = torch.linspace(low, high, 200_001)
    return torch.cat([-small, small, between, torch.zeros(1)]).clamp(low, high)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("is_layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(
    library: ctypes.CDLL,
    dtype: torch.dtype,
    width: int,
    is_layer: bool,
    has_bias: bool,
    offset: float,
) -> None:
    torch.manual_seed(width)
    x, out = torch.randn(ROWS, width) + 3, torch.full((ROWS, width), torch.nan)
    weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
    stored = bias if has_bias else None

    def norm(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        library.loraplex_norm(
            pointer(x),
            pointer(weight),
            pointer(stored),
            int(dtype == torch.bfloat16),
            int(is_layer),
            c_float(offset),
            c_float(1e-5),
            len(x),
            width,
            pointer(out),
        )
        return out

    wide, factor = x.double(), weight.double() + offset
    if is_layer:
        shift = bias.double() if has_bias else None
        wanted = torch.nn.functional.layer_norm(wide, (width,), factor, shift, 1e-5)
    else:
        wanted = torch.nn.functional.rms_norm(wide, (width,), factor, 1e-5)
    torch.testing.assert_close(norm(x, out).double(), wanted, rtol=3e-6, atol=3e-6)
    assert torch.equal(norm(x[2:3].clone(), torch.empty(1, width))[0], out[2])
    assert torch.equal(norm(x, x), out), "a row may be normed in place"


@pytest.mark.parametrize("half", [1, 5, 8, 24, 32, 50])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_turn_pairs(library: ctypes.CDLL, half: int, interleaved: bool) -> None:
    torch.manual_seed(half)
    x, angles = torch.randn(6, 2 * half), torch.randn(6, half)
    cos, sin, got = angles.cos(), angles.sin(), x.clone()
    library.loraplex_rotate(pointer(got), pointer(cos), pointer(sin), int(interleaved), 6, half)
    wide = x.double()
    first, second = (
        (wide[:, 0::2], wide[:, 1::2]) if interleaved else (wide[:, :half], wide[:, half:])
    )
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    wanted = torch.stack([turned.real, turned.imag], 2).flatten(1)
    if not interleaved:
        wanted = torch.cat([turned.real, turned.imag], 1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


def activated(
    library: ctypes.CDLL, activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None
) -> torch.Tensor:
    out = torch.full_like(gate, torch.nan)
    library.loraplex_activate(pointer(gate), pointer(up), activation, gate.numel(), pointer(out))
    return out


FORMULAS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU: lambda x: x * torch.special.erfc(-x / 2**0.5) / 2,
    Activation.GELU_TANH: lambda x: (
        x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    ),
}

ULPS = {Activation.SILU: 4, Activation.GELU: 8, Activation.GELU_TANH: 16}
"""Errors from -3 on; below, results are small parts of their input, and lose more places."""


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_are_accurate_to_a_few_ulp(
    library: ctypes.CDLL, activation: Activation
) -> None:
    formula = FORMULAS[activation]
    x = everywhere(-3.0, 60.0)
    assert ulps(activated(library, activation, x), formula(x.double())) < ULPS[activation]
    tail = everywhere(-40.0, -3.0)
    found, wanted = activated(library, activation, tail).double(), formula(tail.double())
    torch.testing.assert_close(found, wanted, rtol=3e-5, atol=1e-15)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("width", [1, 16, 100, 1537])
def test_a_gate_multiplies(library: ctypes.CDLL, activation: Activation, width: int) -> None:
    torch.manual_seed(width)
    gate, up = torch.randn(width) * 6, torch.randn(width)
    gate[0] = -200.0  # where the exponential would overflow
    alone, both = activated(library, activation, gate), activated(library, activation, gate, up)
    torch.testing.assert_close(both, alone * up, rtol=2e-7, atol=1e-30)
    wanted = FORMULAS[activation](gate.double()) * up.double()
    torch.testing.assert_close(both.double(), wanted, rtol=3e-5, atol=1e-15)


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_caps_are_accurate_to_a_few_ulp(library: ctypes.CDLL, cap: float, scale: float) -> None:
    x = everywhere(-20 * cap, 20 * cap)
    got = x.clone()
    library.loraplex_cap(pointer(got), got.numel(), c_float(scale), c_float(cap))
    assert ulps(got, torch.tanh(x.double() * scale / cap) * cap) < 4
    assert (got.abs() <= cap).all()


def test_what_is_not_finite_stays_in_its_place(library: ctypes.CDLL) -> None:
    x = torch.randn(37)
    x[[3, 36]] = torch.nan
    for activation in FORMULAS:
        assert torch.equal(activated(library, activation, x).isnan(), x.isnan())
    capped = x.clone()
    library.loraplex_cap(pointer(capped), 37, c_float(1), c_float(5))
    assert torch.equal(capped.isnan(), x.isnan())
    ends = torch.tensor([float("inf"), -float("inf")])
    library.loraplex_cap(pointer(ends), 2, c_float(1), c_float(5))
    assert ends.tolist() == [5.0, -5.0]
