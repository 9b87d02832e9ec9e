"""Embedding, norms, activations and scaled logits in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from cuda.nearness import near, rounded
from loraplex_model.base.config import Gate
from loraplex_model.decoder.cuda.kernels import rows

NAN = float("nan")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@TYPES
@pytest.mark.parametrize("hidden", [64, 1030])
def test_embed(hidden: int, dtype: torch.dtype, random: torch.Generator) -> None:
    table = torch.randn(50, hidden, generator=random).to(dtype)
    # drawn tokens: 7, none since a row was not finite, and one that no table has
    last = torch.tensor([7, -1, 60], dtype=torch.int32)
    tokens = torch.tensor([0, 49, 50, 51, -1, -2, -3, -4, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = torch.full((len(tokens), hidden), NAN, dtype=dtype)
    rows.embed(tokens, table, last, out)
    wanted = torch.zeros_like(out)
    wanted[0], wanted[1], wanted[4] = table[0], table[49], table[7]
    assert torch.equal(out, wanted)


@TYPES
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("hidden", [64, 1030])
def test_norm_residual(
    hidden: int, has_delta: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    x, delta = (3 * torch.randn(5, hidden, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=random).to(dtype)
    total = rounded(x.float() + delta.float(), dtype) if has_delta else x.clone()
    normed = torch.full_like(x, NAN)
    rows.norm_residual(x, delta if has_delta else None, weight, normed, 1e-5)
    assert torch.equal(x, total)
    wide = total.double()
    unit = rounded(wide * (wide.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(), dtype)
    near(normed, weight.double() * unit.double(), roundings=2)


@TYPES
def test_rows_that_are_wanted_are_normed(dtype: torch.dtype, random: torch.Generator) -> None:
    x, delta = (torch.randn(6, 576, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(576, generator=random).to(dtype)
    every = torch.full_like(x, NAN)
    rows.norm_residual(x.clone(), delta, weight, every, 1e-5)
    kept, normed = x.clone(), torch.full((4, 576), NAN, dtype=dtype)
    wanted = torch.tensor([5, 2, 5, -1], dtype=torch.int32)
    rows.norm_residual(x, delta, weight, normed, 1e-5, wanted)
    assert torch.equal(x, kept)
    assert torch.equal(normed[:3], every[wanted[:3].long()])
    assert normed[3].isnan().all()


@TYPES
@pytest.mark.parametrize("width", [64, 1030])
@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("is_gated", [True, False])
def test_activate(
    is_gated: bool, gate: Gate, width: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    """Also where an exponential overflows, and where powers of the input do."""
    up = 5 * torch.randn(4, (1 + is_gated) * width, generator=random).to(dtype)
    up[0, :4] = torch.tensor([-200.0, 200.0, -1e20, 1e20])
    out = torch.full((4, width), NAN, dtype=dtype)
    rows.activate(up, out, gate, is_gated=is_gated)
    functions = {
        Gate.SILU: torch.nn.functional.silu,
        Gate.GELU: torch.nn.functional.gelu,
        Gate.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    first, *others = up.double().split(width, dim=1)
    wanted = functions[gate](first)
    for other in others:
        wanted = wanted * other
    near(out, wanted, roundings=2)


@TYPES
@pytest.mark.parametrize(
    ("is_layer", "offset", "has_bias"),
    [(True, 0.0, False), (True, 0.0, True), (False, 1.0, False), (True, 1.0, True)],
)
@pytest.mark.parametrize("hidden", [64, 1030])
def test_norms_of_families(
    hidden: int,
    is_layer: bool,
    offset: float,
    has_bias: bool,
    dtype: torch.dtype,
    random: torch.Generator,
) -> None:
    """With two blocks' results and a factor on both."""
    x, delta, second = (2 + torch.randn(5, hidden, generator=random).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(hidden, generator=random).to(dtype) for _ in range(2))
    total = x
    for added in (delta, second):
        total = rounded(total.double() + rounded(added.double() * 0.3, dtype).double(), dtype)
    normed = torch.full_like(x, NAN)
    rows.norm_residual(
        x,
        delta,
        weight,
        normed,
        1e-5,
        second=second,
        scale=0.3,
        bias=bias if has_bias else None,
        offset=offset,
        is_layer=is_layer,
    )
    near(x, total)
    wide = x.double()
    if is_layer:
        wide = wide - wide.mean(1, keepdim=True)
    wanted = wide * (wide.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + offset)
    near(normed, wanted + bias.double() if has_bias else wanted)


def test_a_stream_that_is_not_normed_is_added_to(random: torch.Generator) -> None:
    x, delta = (torch.randn(5, 64, generator=random) for _ in range(2))
    total, normed = x + delta, torch.full_like(x, NAN)
    rows.norm_residual(x, delta, None, normed, 1e-5)
    assert torch.equal(x, total)
    assert normed.isnan().all()


@TYPES
def test_embeddings_are_scaled(dtype: torch.dtype, random: torch.Generator) -> None:
    table = torch.randn(50, 64, generator=random).to(dtype)
    scale = float(torch.tensor(50**0.5, dtype=dtype))
    out = torch.full((2, 64), NAN, dtype=dtype)
    tokens = torch.tensor([7, 60], dtype=torch.int32)
    rows.embed(tokens, table, torch.tensor([-1], dtype=torch.int32), out, scale)
    assert torch.equal(out[0], table[7] * scale)
    assert not out[1].any()


@pytest.mark.parametrize(("scale", "cap"), [(0.25, 0.0), (1.0, 30.0), (3.0, 0.5)])
def test_finish_logits(scale: float, cap: float, random: torch.Generator) -> None:
    logits = 40 * torch.randn(3, 1030, generator=random)
    logits[1, :3] = torch.tensor([1e4, -1e4, 0.0])
    logits[2, 0] = NAN
    wanted = logits.double() * scale
    if cap:
        wanted = cap * torch.tanh(wanted / cap)
    rows.finish_logits(logits, scale, cap)
    torch.testing.assert_close(logits.double(), wanted, rtol=4e-6, atol=4e-6, equal_nan=True)


def test_every_configuration_has_a_name_of_its_own() -> None:
    names = [compilation.name for compilation in rows.compilations()]
    assert len(set(names)) == len(names)
