"""LoRA on mixed rows: the kernels against float64, with everything unwritten full of NaN."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from loraplex_model.base.batch import Mix
from loraplex_model.base.config import Gate
from loraplex_model.decoder.cuda.kernels import lora as kernels
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import PlanCapacity

from tests.cuda.lora_cases import (
    Adapters,
    Part,
    aligned,
    expected,
    factors,
    plan_of,
    poisoned,
    rows_of,
)

FLOAT, BFLOAT = torch.float32, torch.bfloat16
TOLERANCE = {FLOAT: 2e-6, BFLOAT: 5e-3}  # relative, in the Frobenius norm
SITE = 2  # of the first part; the sites before and behind it belong to nobody
SITES = 6
SPARE = 5  # rows, terms and chunks behind those of a plan


def adapters_of(
    ranks: Sequence[Sequence[int]], fan_in: int, widths: Sequence[int], dtype: torch.dtype
) -> Adapters:
    """Adapters with the rank of each part; the other sites hold addresses that must not be read."""
    generator = torch.Generator().manual_seed(7)
    never = Part(*(torch.full((64, 4096), float("nan")) for _ in range(4)))
    parts = []
    for own in ranks:
        sites = [never] * SITES
        for part, (rank, width) in enumerate(zip(own, widths, strict=True)):
            sites[SITE + part] = factors(generator, rank, fan_in, width, dtype)
        parts.append(sites)
    return Adapters(parts)


def activations(rows: int, width: int, dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    """Random rows, and `SPARE` more that are NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    return torch.cat([values, torch.full((SPARE, width), float("nan"))]).to(dtype)


def launch(x: torch.Tensor, y: torch.Tensor, lora: LoraPass, widths: Sequence[int]) -> torch.Tensor:
    """Shrink and expand, with A x full of NaN before; returns a changed copy of y."""
    y, parts, fan_in = y.clone(), len(widths), x.shape[1]
    scratch = torch.full((kernels.h_size(lora, fan_in, parts) + 3,), float("nan"))
    h = kernels.h_view(scratch, lora, fan_in, parts)
    kernels.shrink(x, h, lora, SITE, parts)
    kernels.expand(h, y, lora, SITE, widths)
    return y


def loaded(mixes: list[tuple[int, Mix]], adapters: Adapters) -> LoraPass:
    """A plan in buffers with some room behind it, which is full of -1 and NaN."""
    plan = plan_of(mixes, adapters)
    own = plan.capacity
    room = PlanCapacity(
        own.rows + SPARE, own.terms + SPARE, own.h_rows + SPARE, own.rank_stride + 16
    )
    lora = poisoned(adapters.entries, room)
    lora.load(plan)
    return lora


def check(got: torch.Tensor, want: torch.Tensor, before: torch.Tensor, mixes: list[Mix]) -> None:
    """Compares changed rows with float64; other rows still have their bits."""
    rows = [row for row, mix in enumerate(mixes) if mix]
    assert rows, "a test without adapters shows nothing"
    error = (got[rows].double() - want[rows]).norm() / (want[rows]).norm()
    assert error < TOLERANCE[got.dtype], f"relative error {error:.2e}"
    untouched = [row for row in range(len(got)) if row not in rows]
    assert torch.equal(bits(got[untouched]), bits(before[untouched]))


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that NaN equals itself."""
    return values.view(torch.int32 if values.dtype == FLOAT else torch.int16)


MIXED: list[tuple[int, Mix]] = [
    (3, ()),
    (18, ((1, 1.0),)),  # two chunks
    (1, ()),
    (2, ((0, 0.5), (4, 2.0), (2, -1.25))),
    (1, ((3, 1.0),)),
    (1, ((2, 1.0),)),
    (1, ((2, 0.75),)),
    (2, ()),
]
RANKS = [(4, 4, 4), (16, 8, 16), (33, 33, 33), (0, 0, 0), (64, 0, 5)]


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(
    ("fan_in", "widths"),
    [
        pytest.param(200, [144, 40, 40], id="qkv"),
        pytest.param(1100, [80], id="several partial sums"),
        pytest.param(72, [200, 200], id="gate and up"),
        pytest.param(37, [51], id="odd sizes"),
    ],
)
def test_mixed_ranks_and_mixes_agree_with_float64(
    fan_in: int, widths: list[int], dtype: torch.dtype
) -> None:
    adapters = adapters_of([ranks[: len(widths)] for ranks in RANKS], fan_in, widths, dtype)
    mixes = rows_of(MIXED)
    x = activations(len(mixes), fan_in, dtype)
    y = activations(len(mixes), sum(widths), dtype, seed=4)
    got = launch(x, y, loaded(MIXED, adapters), widths)
    check(got, expected(x, y, mixes, adapters, SITE, widths), y, mixes)


def with_gains(adapters: Adapters, widths: Sequence[int], slots: Sequence[int]) -> Adapters:
    """The adapters with gains and biases at the middle part (or the only one) of some slots."""
    generator = torch.Generator().manual_seed(11)
    part = len(widths) // 2
    parts = [list(sites) for sites in adapters.parts]
    for slot in slots:
        own = parts[slot][SITE + part]
        gain = aligned(1 + torch.randn(widths[part], generator=generator) / 4)
        bias = aligned(torch.randn(widths[part], generator=generator))
        parts[slot][SITE + part] = Part(own.a, own.b, gain, bias)
    return Adapters(parts)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_gains_and_biases_blend_by_weight(dtype: torch.dtype) -> None:
    widths = [48, 24, 24]
    adapters = with_gains(adapters_of(RANKS, 64, widths, dtype), widths, [1, 3, 4])
    mixes = rows_of(MIXED)
    x = activations(len(mixes), 64, dtype)
    y = activations(len(mixes), sum(widths), dtype, seed=4)
    got = launch(x, y, loaded(MIXED, adapters), widths)
    check(got, expected(x, y, mixes, adapters, SITE, widths), y, mixes)


def test_a_lone_gain_at_weight_one_is_exact() -> None:
    gain = aligned(torch.rand(40, generator=torch.Generator().manual_seed(5)) / 3)
    adapters = Adapters([[Part()] * SITE + [Part(gain=gain)] + [Part()] * 3])
    y = activations(4, 40, FLOAT)
    got = launch(activations(4, 16, FLOAT), y, loaded([(4, ((0, 1.0),))], adapters), [40])
    assert torch.equal(got[:4], y[:4] * gain)


def test_rows_of_an_adapter_without_the_projection_keep_their_bits() -> None:
    adapters = adapters_of([(0, 8)], 32, [40, 24], FLOAT)
    y = activations(3, 64, FLOAT)
    y[0, :5] = -0.0
    got = launch(activations(3, 32, FLOAT), y, loaded([(3, ((0, 1.0),))], adapters), [40, 24])
    assert torch.equal(bits(got[:, :40]), bits(y[:, :40]))
    assert not torch.equal(got[:3, 40:], y[:3, 40:])


def test_ranks_beyond_a_tile() -> None:
    adapters = adapters_of([(200,), (512,), (7,)], 48, [40], FLOAT)
    plan: list[tuple[int, Mix]] = [(2, ((0, 1.0),)), (1, ((1, 1.0),)), (1, ((1, 0.5), (2, -2.0)))]
    mixes = rows_of(plan)
    x, y = activations(4, 48, FLOAT), activations(4, 40, FLOAT, seed=4)
    got = launch(x, y, loaded(plan, adapters), [40])
    check(got, expected(x, y, mixes, adapters, SITE, [40]), y, mixes)


def sixty_four() -> tuple[Adapters, list[tuple[int, Mix]]]:
    """64 adapters of ranks 1 to 64, and a plan with a row of each."""
    adapters = adapters_of([(rank,) for rank in range(1, 65)], 40, [24], FLOAT)
    return adapters, [(1, ((slot, 1.0),)) for slot in range(64)]


def test_a_launch_captured_with_one_segment_serves_sixty_four() -> None:
    """The grid depends on the capacity alone: the same launch with other numbers on the device."""
    adapters, plan = sixty_four()
    capacity = plan_of(plan, adapters).capacity
    lora = poisoned(adapters.entries, capacity)
    x, y = activations(64, 40, FLOAT), activations(64, 24, FLOAT, seed=4)
    grids = []
    for mixes in ([(1, ((9, 1.0),)), (63, ())], plan, [(60, ()), (4, ((5, 0.5), (63, 2.0)))], []):
        lora.load(plan_of(mixes or [(64, ())], adapters))
        got = launch(x, y, lora, [24])
        grids.append(kernels._grid(lora, 1, 4))
        rows = rows_of(mixes or [(64, ())])
        want = expected(x, y, rows, adapters, SITE, [24])
        error = (got[:64].double() - want[:64]).norm() / want[:64].norm()
        assert error < TOLERANCE[FLOAT]
        base = [row for row, mix in enumerate(rows) if not mix]
        assert torch.equal(got[base], y[base])
    assert len(set(grids)) == 1


def test_the_same_inputs_give_the_same_bits_and_neighbours_change_nothing() -> None:
    adapters, plan = sixty_four()
    x, y = activations(64, 40, FLOAT), activations(64, 24, FLOAT, seed=4)
    together = launch(x, y, loaded(plan, adapters), [24])
    assert torch.equal(bits(together), bits(launch(x, y, loaded(plan, adapters), [24])))
    for row in (0, 17, 63):
        alone = launch(x[row : row + 1], y[row : row + 1], loaded([plan[row]], adapters), [24])
        assert torch.equal(alone[0], together[row])
    crowded = loaded([(16, plan[9][1])], adapters)
    among = launch(x[9 - 5 : 9 + 11], y[9 - 5 : 9 + 11], crowded, [24])
    assert torch.equal(among[5], together[9])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
@pytest.mark.parametrize(
    ("width", "gate"), [(72, Gate.SILU), (200, Gate.SILU), (72, Gate.GELU_TANH)]
)
def test_expanding_with_the_activation_equals_expanding_first(
    dtype: torch.dtype, width: int, gate: Gate
) -> None:
    """All rows, those of the bare base and those behind the pass included."""
    widths = [width, width]
    ranks = [own[:2] for own in RANKS]
    adapters = with_gains(adapters_of(ranks, 64, widths, dtype), widths, [1, 3])
    mixes = rows_of(MIXED)
    x = activations(len(mixes), 64, dtype)
    y = activations(len(mixes), 2 * width, dtype, seed=4)
    lora = loaded(MIXED, adapters)
    expanded = launch(x, y, lora, widths)
    own, up = expanded.float().split(width, 1)
    active = torch.nn.functional.silu(own)
    if gate is Gate.GELU_TANH:
        active = torch.nn.functional.gelu(own, approximate="tanh")
    want = (active.to(dtype).float() * up).to(dtype)

    h = kernels.h_view(torch.full((kernels.h_size(lora, 64, 2),), float("nan")), lora, 64, 2)
    kernels.shrink(x, h, lora, SITE, 2)
    before = y.clone()
    out = torch.full((len(y), width), float("nan"), dtype=dtype)
    kernels.expand_gated(h, y, out, lora, SITE, gate)
    assert torch.equal(bits(y), bits(before)), "the base's result is only read"
    torch.testing.assert_close(
        out[: len(mixes)], want[: len(mixes)], rtol=1e-2 if dtype == BFLOAT else 1e-6, atol=1e-6
    )
    assert not out[: len(mixes)].isnan().any()


def test_the_head_adds_bfloat16_factors_to_float32_logits() -> None:
    adapters = adapters_of([(16,), (5,)], 64, [300], BFLOAT)
    plan: list[tuple[int, Mix]] = [(1, ()), (2, ((1, 1.0),)), (1, ((0, 0.5), (1, 0.5)))]
    mixes = rows_of(plan)
    x, y = activations(4, 64, BFLOAT), activations(4, 300, FLOAT, seed=4)
    lora = loaded(plan, adapters)
    h = kernels.h_view(torch.full((kernels.h_size(lora, 64, 1),), float("nan")), lora, 64, 1)
    kernels.shrink(x, h, lora, SITE, 1)
    got = y.clone()
    kernels.expand(h, got, lora, SITE, [300], BFLOAT)
    check(got, expected(x, y, mixes, adapters, SITE, [300]), y, mixes)


def test_configurations_depend_on_shapes_alone_and_names_are_unique() -> None:
    compilations = kernels.compilations()
    assert len({c.name for c in compilations}) == len(compilations)
    for fan_in in (37, 576, 1536, 4096, 14336):
        shape = kernels.shrink_shape(fan_in)
        assert (shape.splits - 1) * shape.span < fan_in <= shape.splits * shape.span
        assert shape.span % shape.step == 0
