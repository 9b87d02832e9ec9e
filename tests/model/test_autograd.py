"""Derivatives written by hand equal finite differences and autograd's own, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loraplex_model.adapters import spans
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta, VirtualTokens
from loraplex_model.adapters.mix import Dropout, RowGroup
from loraplex_model.decoder.attention import PackedAttention
from loraplex_model.ops import autograd, nf4
from loraplex_model.ops.linear import DenseLinear, DequantisedLinear, ScratchLinear
from model.conftest import Load
from torch.autograd import gradcheck

CHANCE = torch.Generator().manual_seed(0)


def normal(*shape: int, **options: Any) -> torch.Tensor:
    """A leaf."""
    wide = torch.randn(*shape, generator=CHANCE, dtype=torch.float64)
    return wide.to(**options).requires_grad_() if options else wide.requires_grad_()


def test_rms_norm() -> None:
    weight = normal(6).detach()
    assert gradcheck(lambda x: autograd.rms_norm(x, weight, 1e-3)[0], normal(5, 6))
    assert gradcheck(lambda x: autograd.rms_norm(x, weight, 1e-3)[0], normal(4, 3, 6))
    x = normal(5, 6)
    wanted = torch.nn.functional.rms_norm(x, (6,), weight, 1e-3)
    torch.testing.assert_close(autograd.rms_norm(x, weight, 1e-3)[0], wanted)


def test_rotations() -> None:
    angles = normal(4, 1, 3).detach()
    cos, sin = angles.cos(), angles.sin()
    assert gradcheck(lambda x: autograd.rotate(x, cos, sin), normal(4, 2, 6))
    # the first two of three heads, in place, on what is not a leaf
    x = normal(4, 18)
    assert gradcheck(lambda x: autograd.rotate_first_(x * 2, 2, cos, sin), x)
    whole = autograd.rotate_first_(x * 2, 2, cos, sin).view(4, 3, 6)
    assert torch.equal(whole[:, :2], autograd.rotate(2 * x.view(4, 3, 6)[:, :2], cos, sin))
    assert torch.equal(whole[:, 2], 2 * x.view(4, 3, 6)[:, 2])


def test_silu_mul() -> None:
    x = normal(5, 8)
    assert gradcheck(lambda x: autograd.silu_mul(x)[0], x)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(autograd.silu_mul(x)[0], torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_recipes_make_the_same_bits_in_the_same_type(dtype: torch.dtype) -> None:
    x, weight = normal(5, 8, dtype=dtype), normal(8, dtype=torch.float32).detach()
    for made, recipe in (autograd.rms_norm(x, weight, 1e-5), autograd.silu_mul(x)):
        assert made.dtype == dtype
        assert torch.equal(recipe.make(*recipe.sources), made)
        made.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


MODULES = [("q_proj", 4), ("k_proj", 2), ("v_proj", 2)]
BASE = torch.randn(8, 5, generator=CHANCE, dtype=torch.float64)


def adapted(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Two jobs of different kinds on rows 0:3 and 4:7 of [8, 5]; rows 3 and 7 are the base's."""
    aq, bq, gain, bias, ak, bk, inner, av, bv = tensors
    one = {
        (0, "q_proj"): ProjectionDelta(a=aq, b=bq, gain=gain, bias=bias),
        (0, "v_proj"): ProjectionDelta(a=av, b=bv),
    }
    other = {
        (0, "k_proj"): ProjectionDelta(a=ak, b=bk, in_gain=inner),
        (0, "q_proj"): ProjectionDelta(bias=bias),
        (0, "v_proj"): ProjectionDelta(a=av, b=bv),
    }
    groups = []
    for sites, rows in ((one, slice(0, 3)), (other, slice(4, 7))):
        at = torch.arange(rows.start, rows.stop)
        groups.append(RowGroup(at, ((AdapterDelta(sites), 1.0),), span=rows))
    return spans.project(lambda z: z @ BASE.T, x, 0, "qkv", MODULES, groups)


def plain(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """The same by the formula, with autograd's own derivatives."""
    aq, bq, gain, bias, ak, bk, inner, av, bv = tensors
    y = x @ BASE.T
    q, k, v = y.split([4, 2, 2], dim=1)
    x1, x2 = x[0:3], x[4:7]
    first = torch.cat(
        [gain * q[0:3] + x1 @ aq.T @ bq + bias, k[0:3], v[0:3] + x1 @ av.T @ bv], dim=1
    )
    changed = (x2 * inner) @ BASE.T[:, 4:6]
    second = torch.cat([q[4:7] + bias, changed + x2 @ ak.T @ bk, v[4:7] + x2 @ av.T @ bv], dim=1)
    return torch.cat([first, y[3:4], second, y[7:]])


def arguments() -> list[torch.Tensor]:
    shapes = [(8, 5), (2, 5), (2, 4), (4,), (4,), (3, 5), (3, 2), (5,), (1, 5), (1, 2)]
    return [normal(*shape) for shape in shapes]


def test_adapters_on_spans() -> None:
    given = arguments()
    torch.testing.assert_close(adapted(*given), plain(*given))
    assert gradcheck(adapted, given)


def test_adapters_on_spans_of_a_constant_input() -> None:
    """As in the first layer: gradients for the adapters, none for x."""
    x, *tensors = arguments()
    assert gradcheck(lambda *given: adapted(x.detach(), *given), tensors)


def test_an_input_gain_of_a_matrix_of_its_own() -> None:
    """One product for all rows; the scaled ones are not computed twice."""
    calls = []

    def product(z: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        return z @ BASE.T

    def project(x: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        groups = []
        for gain, span in ((other, slice(5, 8)), (one, slice(0, 2))):
            delta = AdapterDelta({(0, "o_proj"): ProjectionDelta(in_gain=gain)})
            groups.append(RowGroup(torch.arange(2), ((delta, 1.0),), span=span))
        return spans.project(product, x, 0, "o", [("o_proj", 8)], groups)

    x, one, other = normal(9, 5), normal(5), normal(5)
    scaled = torch.cat([x[:2] * one, x[2:5], x[5:8] * other, x[8:]])
    torch.testing.assert_close(project(x, one, other), scaled @ BASE.T)
    assert calls == [9]
    assert gradcheck(project, (x, one, other))


@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_dropout_has_the_mean_and_the_share_of_zeros(probability: float) -> None:
    dropout = Dropout(probability, seed=3)
    x = torch.ones(400, 300, dtype=torch.float64)
    a, b = torch.eye(300, dtype=torch.float64), torch.eye(300, dtype=torch.float64)
    delta = AdapterDelta({(0, "o_proj"): ProjectionDelta(a=a, b=b)})
    group = RowGroup(torch.arange(400), ((delta, 1.0),), span=slice(0, 400), dropout=dropout)
    kept = spans.project(torch.zeros_like, x, 0, "o", [("o_proj", 300)], [group])
    assert set(kept.unique().tolist()) == {0.0, 1 / (1 - probability)}
    share = float((kept == 0).double().mean())
    assert abs(share - probability) < 5 * (probability * (1 - probability) / x.numel()) ** 0.5


def test_dropout_is_derived_through_the_mask_it_drew() -> None:
    dropout = Dropout(0.4, seed=5)
    tensors = [normal(8, 5), normal(2, 5), normal(2, 4), normal(1, 5), normal(1, 2)]

    def project(x: torch.Tensor, aq: Any, bq: Any, av: Any, bv: Any) -> torch.Tensor:
        sites = {
            (0, "q_proj"): ProjectionDelta(a=aq, b=bq),
            (0, "v_proj"): ProjectionDelta(a=av, b=bv),
        }
        rows = slice(1, 7)
        group = RowGroup(
            torch.arange(1, 7), ((AdapterDelta(sites), 1.0),), span=rows, dropout=dropout
        )
        return spans.project(lambda z: z @ BASE.T, x, 0, "qkv", MODULES, [group])

    assert gradcheck(project, tensors)
    x, aq, bq, av, bv = tensors
    q, v = (dropout.mask((0, name), x[1:7]) / 0.6 * x[1:7] for name in ("q_proj", "v_proj"))
    wanted = (x @ BASE.T).detach().clone()
    wanted[1:7, :4] += (q @ aq.T @ bq).detach()
    wanted[1:7, 6:] += (v @ av.T @ bv).detach()
    torch.testing.assert_close(project(*tensors).detach(), wanted)
    assert not torch.equal(q, v), "each module drops its own"


@pytest.mark.parametrize("shapes", [[(6, 64), (2, 64)], [(5, 80), (3, 80)]])
def test_products_with_an_unpacked_base(shapes: list[tuple[int, int]]) -> None:
    from loraplex_model.ops import unpack

    matrix = nf4.stack([nf4.quantise(normal(*shape).detach().float()) for shape in shapes])
    dense = nf4.dequantize(matrix).double()
    for unpacking in (None, unpack.kernel()):
        linear = ScratchLinear(unpacking)
        x = normal(7, shapes[0][1])
        torch.testing.assert_close(linear(matrix, x), x @ dense.T)
        assert gradcheck(lambda x, linear=linear: linear(matrix, x), x)


@pytest.mark.parametrize(
    ("starts", "past", "window"),
    [
        ([0, 6, 12, 15], [0, 0, 0], None),  # two of one length are one call
        ([0, 6, 12], [0, 0], 3),
        ([0, 4, 8, 10], [3, 3, 0], None),
        ([0, 4, 9], [3, 0], 2),
    ],
)
def test_attention_within_sequences(
    starts: list[int], past: list[int], window: int | None, load_tiny: Load
) -> None:
    """Against scores written out, with keys and values before some sequences, and windows."""
    from dataclasses import replace

    config = replace(load_tiny("llama").weights.config, sliding_windows=(window,) * 3)
    q, k, v = normal(starts[-1], 4, 2), normal(starts[-1], 2, 2), normal(starts[-1], 2, 2)
    keys, values = normal(3, 3, 2, 2), normal(3, 3, 2, 2)
    prefix = VirtualTokens(keys=keys, values=values)
    attention = PackedAttention(config, starts, [prefix if n else None for n in past])

    def wanted(q: Any, k: Any, v: Any, keys: Any, values: Any) -> torch.Tensor:
        parts = []
        for s, n in enumerate(past):
            rows = slice(starts[s], starts[s + 1])
            ks = torch.cat([keys[1], k[rows]]) if n else k[rows]
            vs = torch.cat([values[1], v[rows]]) if n else v[rows]
            for i, query in enumerate(q[rows]):
                first = 0 if window is None else max(0, n + i + 1 - window)
                for head in range(4):
                    seen = ks[first : n + i + 1, head // 2], vs[first : n + i + 1, head // 2]
                    parts.append(torch.softmax(seen[0] @ query[head] * 2**-0.5, 0) @ seen[1])
        return torch.stack(parts).view(starts[-1], 8)

    given = [q, k, v, keys, values]
    found, right = attention(1, q, k, v), wanted(*given)
    torch.testing.assert_close(found, right)
    weights = torch.randn(found.shape, generator=CHANCE, dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum(), given, allow_unused=True)
    theirs = torch.autograd.grad((right * weights).sum(), given, allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_product_of_floats_is_the_same_with_either_linear(load_tiny: Load) -> None:
    from loraplex_model.ops import unpack

    matrix = load_tiny("llama").weights.layers[0].gate_up
    x = normal(40, 64, dtype=torch.float32)
    wanted = DequantisedLinear()(matrix, x)
    for linear in (ScratchLinear(), ScratchLinear(unpack.kernel()), DenseLinear()):
        assert torch.equal(linear(matrix, x), wanted)
