"""LoRA on mixed rows: the kernels against float64, with everything unwritten full of NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from loraplex_model.base.batch import Mix
from loraplex_model.decoder.cuda.kernels import lora as kernels
from loraplex_model.decoder.cuda.lora_pass import LoraPass
from loraplex_model.decoder.cuda.plan import PlanCapacity

from tests.cuda.lora_cases import Adapters, Part, aligned, expected, factors
from tests.cuda.lora_cases import plan_of, poisoned, rows_of

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


def launch(
    x: torch.Tensor, y: torch.Tensor, lora: LoraPass, widths: Sequence[int]
) -> torch.Tensor:
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
