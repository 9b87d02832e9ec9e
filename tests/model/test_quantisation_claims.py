"""What the QLoRA paper (arXiv 2305.14314) says of NF4 and double quantisation, of our own bytes.

Every format here is a list of levels in [-1, 1] and a block: a weight becomes the nearest level
times its block's largest absolute value. That is computed in float64, apart from our quantiser and
from bitsandbytes'.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch
from loraplex_model.adapters import merge
from loraplex_model.adapters.delta import ProjectionDelta
from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import nf4

SIZE = 512
OFFSET = 0.9677083
"""Appendix E: the outermost quantile. Half way between 1 - 1/32 and 1 - 1/30, seven digits."""

NF4 = bnb.get_4bit_type("nf4", device="cpu").double()
FP4 = bnb.get_4bit_type("fp4", device="cpu").double()
INT4 = torch.arange(-7, 8).double() / 7


def gaussian(size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def student(size: int = SIZE, seed: int = 0, freedom: int = 5) -> torch.Tensor:
    """Heavier tails: a Gaussian over the root of a mean of `freedom` squared Gaussians."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(1 + freedom, size, size, generator=random)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def uniform(size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) - 1


def rounded(weight: torch.Tensor, levels: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """float64, in the weight's shape."""
    blocks = weight.double().reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    ascending = levels.sort().values
    between = (ascending[1:] + ascending[:-1]) / 2
    return (ascending[torch.bucketize(blocks / largest, between)] * largest).view_as(weight)


def error(weight: torch.Tensor, found: torch.Tensor) -> float:
    """|W' - W| / |W|, Frobenius."""
    return float((found - weight).double().norm() / weight.double().norm())


def quantised_once(weight: torch.Tensor) -> NF4Matrix:
    """NF4 whose maxima stay float32."""
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    out, fan_in = weight.shape
    return NF4Matrix((out, fan_in), packed.reshape(-1), state.absmax, (), (), (out,))


def bits_per_weight(matrix: NF4Matrix) -> float:
    """Codes and constants, as they lie in memory; the one offset of a whole matrix aside."""
    parts = (matrix.packed, matrix.absmax, *matrix.absmax_scales)
    return 8 * sum(part.nbytes for part in parts) / (matrix.shape[0] * matrix.shape[1])


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Eight of the upper half and seven of the lower, with a zero of its own, so not symmetric."""

    def quantiles(count: int) -> list[float]:
        step = (OFFSET - 0.5) / count
        return [NormalDist().inv_cdf(OFFSET - i * step) for i in range(count)]

    upper, lower = quantiles(8), quantiles(7)
    largest = upper[0]
    derived = sorted([q / largest for q in upper] + [-q / largest for q in lower] + [0.0])
    ours = nf4.nf4_code().double()
    assert float((torch.tensor(derived).double() - ours).abs().max()) < 2e-7
    assert len(set(ours.tolist())) == 16
    assert (float(ours[0]), float(ours[7]), float(ours[15])) == (-1.0, 0.0, 1.0)
    assert not torch.allclose(ours, -ours.flip(0), atol=0.05)


def test_double_quantisation_saves_0_373_bits_a_weight() -> None:
    weight = gaussian()
    single, double = quantised_once(weight), nf4.quantise(weight)
    assert bits_per_weight(single) == 4 + 32 / 64
    assert bits_per_weight(double) == 4 + 8 / 64 + 32 / (64 * 256)
    assert bits_per_weight(single) - bits_per_weight(double) == pytest.approx(0.373, abs=1e-4)


def test_maxima_are_centred_by_their_mean_and_scaled_by_blocks_of_256() -> None:
    weight = student()
    matrix = nf4.quantise(weight)
    maxima = weight.double().reshape(-1, BLOCK).abs().amax(1)
    assert matrix.absmax.dtype == torch.uint8
    assert matrix.absmax_offsets[0] == pytest.approx(float(maxima.mean()), rel=1e-6)
    centred = (maxima - maxima.mean()).view(-1, 256)
    (scales,) = matrix.absmax_scales
    assert scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), centred.abs().amax(1), rtol=1e-5, atol=1e-6)
    # each maximum is one of 256 levels, none further away than half the widest gap between levels
    gap = float(nf4.dynamic_map().diff().max())
    found = nf4.absmax_float(matrix).double().view(-1, 256)
    distance = (found - maxima.view(-1, 256)).abs() / scales.double()[:, None]
    assert float(distance.max()) < 0.51 * gap


def test_centring_the_maxima_is_what_keeps_their_second_rounding_small() -> None:
    """They are all positive, so without it half of the 256 levels would never be used."""
    weight = gaussian()
    matrix = nf4.quantise(weight)
    maxima = weight.reshape(-1, BLOCK).abs().amax(1)
    plain = bnb.dequantize_blockwise(*bnb.quantize_blockwise(maxima, blocksize=256))
    assert error(maxima, nf4.absmax_float(matrix).reshape(-1)) < 0.5 * error(maxima, plain)


def test_double_quantisation_costs_next_to_no_precision() -> None:
    weight = gaussian()
    single = error(weight, nf4.dequantize(quantised_once(weight)))
    assert error(weight, nf4.dequantize(nf4.quantise(weight))) < 1.001 * single


@pytest.mark.parametrize("made", [gaussian, student, uniform])
def test_ours_is_the_nearest_level(made: Callable[[], torch.Tensor]) -> None:
    """The comparisons below are of levels; this ties those of NF4 to what is served."""
    weight = made()
    ours = nf4.dequantize(quantised_once(weight))
    assert error(rounded(weight, NF4), ours) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_on_bell_shaped_weights_nf4_errs_least(seed: int) -> None:
    for weight in (gaussian(seed=seed), student(seed=seed)):
        ours = error(weight, nf4.dequantize(nf4.quantise(weight)))
        int4, fp4 = (error(weight, rounded(weight, levels)) for levels in (INT4, FP4))
        assert 1.02 * ours < int4
        assert 1.02 * int4 < fp4


def test_on_evenly_spread_weights_it_does_not() -> None:
    """The control: NF4 is best because weights are bell-shaped, not on any weights."""
    weight = uniform()
    ours = error(weight, nf4.dequantize(nf4.quantise(weight)))
    assert 1.1 * error(weight, rounded(weight, INT4)) < ours


def test_the_error_grows_with_the_block() -> None:
    weight = gaussian()
    errors = [error(weight, rounded(weight, NF4, 64 << i)) for i in range(7)]
    assert error(weight, nf4.dequantize(nf4.quantise(weight))) == pytest.approx(errors[0], rel=1e-3)
    assert all(1.01 * small < large for small, large in pairwise(errors))


def test_what_is_added_to_dense_weights_comes_off_again() -> None:
    """LoRA's section 4.1, in float32: W + B A - B A is W but for rounding."""
    random = torch.Generator().manual_seed(0)
    weight = nf4.dequantize(nf4.quantise(gaussian()))
    a, b = (torch.randn(16, SIZE, generator=random) * 0.02 for _ in range(2))
    merged = merge.merged_module(weight, ProjectionDelta(a=a, b=b))
    restored = merge.merged_module(merged, ProjectionDelta(a=a, b=-b))
    assert error(weight, merged) > 1e-3
    assert error(weight, restored) < 1e-7


def test_in_nf4_it_does_not_and_less_stays_the_smaller_it_is() -> None:
    """What is kept of a change, <W' - W, D> / |D|^2, grows with the change; almost nothing at 1 %
    of the weight's size, almost all at 30 %. And after taking it off again codes have changed."""
    random = torch.Generator().manual_seed(0)
    before = nf4.quantise(gaussian())
    weight = nf4.dequantize(before)
    a, b = (torch.randn(16, SIZE, generator=random) for _ in range(2))
    scale = float(weight.norm() / (b.T @ a).norm())
    sizes, kept = (0.003, 0.01, 0.03, 0.1, 0.3), []
    for size in sizes:
        change = ProjectionDelta(a=a * scale * size, b=b)
        added = merge.merged_module(weight, change) - weight
        merged = nf4.dequantize(nf4.quantise(weight + added))
        kept.append(float(((merged - weight) * added).sum() / added.square().sum()))
    assert kept == sorted(kept)
    assert kept[1] < 0.05
    assert kept[-1] > 0.95
    again = nf4.quantise(merge.merged_module(merged, ProjectionDelta(a=a * scale * 0.3, b=-b)))
    assert float((again.packed != before.packed).float().mean()) > 0.2
