"""Training in bfloat16: each kernel's result is that of float64 up to the roundings it documents.

A bfloat16 has 8 significant bits, so rounding changes a number by at most 2^-8 of it. Sums are
float32: n terms are within n 2^-23 of the sum of their magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from unittest import mock

import pytest
import torch
from loraplex_model.ops import elementwise, nf4, products
from loraplex_model.ops.build import Kernels
from loraplex_model.ops.products import Attending, LowRank, LowRankRows

ROUNDING = 2.0**-8
SUM = 2.0**-23


@pytest.fixture(autouse=True)
def _kernels(bf16_library: Kernels) -> Iterator[None]:
    assert bf16_library.loraplex_train_has_products()
    with (
        mock.patch.object(products, "_library", return_value=bf16_library),
        mock.patch.object(elementwise, "_library", return_value=bf16_library),
    ):
        yield


def draw(*shape: int, seed: int = 0, narrow: bool = True) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16() if narrow else values


def within(found: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor | float) -> None:
    assert found.shape == wanted.shape
    assert bool((found.double() - wanted <= bound).all())
    assert bool((wanted - found.double() <= bound).all())


# Rows that are no whole tile, one tile, several blocks; columns that are no whole tile.
@pytest.mark.parametrize("rows", [1, 16, 37, 100])
@pytest.mark.parametrize(("out", "fan_in"), [(8, 64), (96, 128), (100, 192)])
def test_products_with_a_base_matrix(rows: int, out: int, fan_in: int) -> None:
    matrix = nf4.stack(
        [nf4.quantise(draw(n, fan_in, narrow=False, seed=n)) for n in (out // 2, out - out // 2)]
    )
    maxima, weight = nf4.maxima(matrix), nf4.dequantize(matrix).bfloat16().double()
    x, g = draw(rows, fan_in, seed=1), draw(rows, out, seed=2)
    for found, left, right in (
        (products.product(matrix, maxima, x), x, weight.T),
        (products.product(matrix, maxima, g, back=True), g, weight),
    ):
        wanted = left.double() @ right
        sums = left.double().abs() @ right.abs() * len(right) * SUM
        within(found, wanted, wanted.abs() * ROUNDING + 2 * sums)


def test_a_row_depends_on_itself_alone() -> None:
    matrix = nf4.quantise(draw(96, 128, narrow=False))
    maxima, x = nf4.maxima(matrix), draw(70, 128, seed=1)
    whole = products.product(matrix, maxima, x)
    x[3, 5] = torch.nan
    found = products.product(matrix, maxima, x)
    assert found[3].isnan().all()
    others = torch.arange(70) != 3
    assert torch.equal(found[others], whole[others])
    assert torch.equal(products.product(matrix, maxima, x[40:41]), whole[40:41])


def test_the_head_its_gradient_and_the_loss_between_them() -> None:
    weight, x = draw(3333, 72), draw(45, 72, seed=1)
    scores = torch.empty(45, 3333, dtype=torch.bfloat16)
    products.head(weight, x, scores)
    wanted = x.double() @ weight.double().T
    within(scores, wanted, wanted.abs() * ROUNDING + 72 * SUM * (x.abs() @ weight.abs().T).double())
    targets = torch.randint(0, 3333, (45,), generator=torch.Generator().manual_seed(2))
    exact = scores.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    assert torch.equal(
        elementwise.cross_entropy(scores.clone(), targets, slope=False),
        elementwise.cross_entropy(scores, targets, slope=True),
    )
    scores.copy_(exact.detach())
    found = elementwise.cross_entropy(scores, targets, slope=True)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=1e-5)
    assert exact.grad is not None
    within(scores, exact.grad, exact.grad.abs() * (ROUNDING + 2e-6) + 1e-7)
    into = draw(45, 72, seed=3, narrow=False)
    before = into.double()
    products.head_gradient(weight, scores, into)
    wanted = before + scores.double() @ weight.double()
    within(
        into, wanted, 3400 * SUM * (before.abs() + (scores.abs().double() @ weight.abs().double()))
    )


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "window"),
    [
        ((5, 33, 1, 70), 4, 2, 32, 0),
        ((90, 31), 4, 1, 80, 16),
        ((40, 100), 2, 2, 24, 40),
        ((64,), 3, 3, 128, 0),
    ],
)
def test_attention(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, window: int
) -> None:
    rows, spans = sum(lengths), [0]
    for length in lengths:
        spans.append(spans[-1] + length)
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    qkv, g = draw(rows, sum(sizes)), draw(rows, heads * width, seed=1)
    q, k, v = (t.unflatten(1, (-1, width)) for t in torch.split(qkv, sizes, dim=1))
    how = Attending(torch.tensor(spans, dtype=torch.int32), window, width**-0.5)
    found = products.attend(q, k, v, how)
    grads = products.attend_back(q, k, v, how, found, g)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    outs, magnitudes = [], []
    for start, end in pairwise(spans):
        at = torch.arange(end - start)
        seen = at <= at[:, None]
        if window:
            seen &= at > at[:, None] - window
        mine, keys, values = (
            t[start:end].transpose(0, 1).repeat_interleave(heads // t.shape[1], 0) for t in wide
        )
        scores = mine @ keys.mT * how.scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ values).transpose(0, 1).flatten(1))
        magnitudes.append((weights @ values.abs()).transpose(0, 1).flatten(1))
    wanted = torch.cat(outs)
    # The weights are rounded, then the result.
    bound = ROUNDING * (torch.cat(magnitudes) * 1.01 + wanted.abs())
    within(found[0], wanted.detach(), bound.detach() + 1e-6)
    wanted.backward(g.double())
    for mine, theirs in zip(grads, wide, strict=True):
        assert theirs.grad is not None
        error = (mine.double() - theirs.grad).norm() / theirs.grad.norm()
        # The slopes, the result that is read and the sum are rounded: three errors of 0.41 ROUNDING
        # in the mean square, independent of each other.
        assert error < ROUNDING


def test_attention_of_a_sequence_depends_on_itself_alone() -> None:
    qkv = draw(60, 4, 32)
    how = Attending(torch.tensor([0, 25, 60], dtype=torch.int32), 0, 0.2)
    own = Attending(torch.tensor([0, 35], dtype=torch.int32), 0, 0.2)

    def both(rows: torch.Tensor, of: Attending) -> tuple[torch.Tensor, ...]:
        q, k, v = rows[:, :2], rows[:, 2:3], rows[:, 3:]
        found = products.attend(q, k, v, of)
        g = rows[:, :2].flatten(1).contiguous()
        return (found[0], *products.attend_back(q, k, v, of, found, g))

    together = both(qkv, how)
    qkv[:25] = torch.nan
    beside, alone = both(qkv, how), both(qkv[25:], own)
    for one, two, three in zip(together, beside, alone, strict=True):
        assert torch.equal(one[25:], two[25:])
        assert torch.equal(one[25:], three)


@pytest.mark.parametrize("rows", [(37,), (40, 64, 5), (530,)])
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_low_rank_changes(rows: tuple[int, ...], rank: int) -> None:
    fan_in, width = 72, 100
    total = sum(rows) + 3  # three rows before them are nobody's
    y, g, x = draw(total, width), draw(total, width, seed=1), draw(total, fan_in, seed=2)
    readings, start = [], 3
    for number, count in enumerate(rows):
        own = x[start : start + count]
        factors = [
            (draw(r, fan_in, seed=5 + r + number, narrow=False) / 8, column, columns)
            for r, column, columns in ((rank, 0, 40), (3, 60, 40))
        ]
        changes = [
            LowRank(a, draw(columns, len(a), seed=7 + number, narrow=False).T / 4, column)
            for a, column, columns in factors
        ]
        assert not changes[-1].b.is_contiguous()
        reduced = torch.empty(count, rank + 3, dtype=torch.bfloat16)
        readings.append(LowRankRows(start, own, reduced, changes))
        start += count
    before = y.clone()
    products.add_low_rank(y, readings)
    assert torch.equal(y[:3], before[:3])
    to_x = [draw(len(r.x), fan_in, seed=9) for r in readings]
    base = [t.clone() for t in to_x]
    adds = [i % 2 == 0 for i in range(len(rows))]
    found = products.low_rank_gradients(g, readings, to_x, adds)
    for i, reading in enumerate(readings):
        span = slice(reading.row, reading.row + len(reading.x))
        own, slopes, bound = reading.x.double(), [], 0.0
        into = base[i].double() if adds[i] else torch.zeros_like(base[i]).double()
        first = 0
        for change, (to_a, to_b) in zip(reading.changes, found[i], strict=True):
            a, b = change.a.bfloat16().double(), change.b.bfloat16().double()
            columns = slice(change.column, change.column + b.shape[1])
            h, part = own @ a.T, g[span, columns].double()
            kept = reading.reduced[:, first : first + len(a)].double()
            within(kept, h, h.abs() * ROUNDING + 80 * SUM * (own.abs() @ a.abs().T))
            wanted = before[span, columns].double() + kept @ b
            within(
                y[span, columns], wanted, wanted.abs() * ROUNDING + 80 * SUM * kept.abs() @ b.abs()
            )
            many = len(own) * SUM
            within(to_b, kept.T @ part, many * (kept.abs().T @ part.abs()))
            slope = part @ b.T
            rounded = slope.abs() * ROUNDING + 80 * SUM * (part.abs() @ b.abs().T)
            within(to_a, slope.T @ own, rounded.T @ own.abs() + many * (slope.abs().T @ own.abs()))
            into = into + slope @ a
            slopes.append(rounded @ a.abs())
            first += len(a)
        bound = into.abs() * ROUNDING + sum(slopes) + 80 * SUM
        within(to_x[i], into, bound * 1.01)


def test_elementwise_steps() -> None:
    x, weight, g = draw(7, 45, narrow=False), draw(45, seed=1, narrow=False), draw(7, 45, seed=2)
    wide = x.double().requires_grad_()
    wanted = torch.nn.functional.rms_norm(wide, (45,), weight.double(), 1e-5)
    found, scale = elementwise.rms_norm(x, weight, 1e-5, torch.bfloat16)
    within(found, wanted.detach(), wanted.detach().abs() * 1.01 * ROUNDING)
    assert torch.equal(elementwise.scaled(x, scale, weight, torch.bfloat16), found)
    wanted.backward(g.double())
    assert wide.grad is not None
    back = elementwise.rms_norm_backward(x, scale, weight, g)
    torch.testing.assert_close(back.double(), wide.grad, rtol=1e-5, atol=1e-5)

    gate_up = 4 * draw(7, 90, seed=3)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    gated = elementwise.silu_mul(gate_up)
    within(gated, wanted.detach(), wanted.detach().abs() * 1.01 * ROUNDING + 1e-7)
    wanted.backward(g.double())
    assert wide.grad is not None
    slope = elementwise.silu_mul_backward(gate_up, g)
    within(slope, wide.grad, wide.grad.abs() * 1.01 * ROUNDING + 1e-6)


def test_rotation_and_back() -> None:
    x, angle = draw(9, 70), draw(9, 1, 10, seed=1, narrow=False)
    cos, sin = angle.cos(), angle.sin()
    turned = x.clone()
    elementwise.rotate_(turned, 3, cos, sin)
    assert torch.equal(turned[:, 60:], x[:, 60:])
    a, b = x[:, :60].double().view(9, 3, 20).chunk(2, dim=-1)
    c, s = cos.double(), sin.double()
    wanted = torch.cat([a * c - b * s, b * c + a * s], -1).flatten(1)
    within(turned[:, :60], wanted, wanted.abs() * 1.01 * ROUNDING + 1e-6)
    elementwise.rotate_(turned, 3, cos, sin, back=True)
    size = x[:, :60].double().view(9, 3, 2, 10).norm(dim=2).repeat(1, 1, 2).flatten(1)
    within(turned[:, :60], x[:, :60].double(), size * 3 * ROUNDING)
