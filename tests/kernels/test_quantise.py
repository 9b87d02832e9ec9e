"""The kernel that quantises to NF4 gives the very bytes of bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
from loraplex_model.ops import build, nf4, quantise
from loraplex_model.ops.build import Kernels

SIZES = (1, 2, 63, 64, 65, 127, 128, 64 * 301 + 7)


def values(kind: str, count: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(count)
    weights = torch.randn(count, generator=chance)
    match kind:
        case "zeros":
            return torch.zeros(count)
        case "tiny":  # smaller than the least divisor
            return weights * 1e-39
        case "spread":
            return weights * torch.exp(12 * torch.randn(count, generator=chance))
        case "on the edges":  # exactly at midpoints between codes, and next to them
            code = nf4.nf4_code()
            edges = (code[1:] + code[:-1]) / 2
            edges = torch.cat([edges, edges.nextafter(torch.tensor(1.0)), torch.tensor([1.0])])
            return edges.repeat(-(-count // len(edges)))[:count]
    return weights


@pytest.mark.parametrize("kind", ["normal", "zeros", "tiny", "spread", "on the edges"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_bytes_of_bitsandbytes(
    library: Kernels, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "_CHUNK", 64 * 7)
    with mock.patch.object(build, "load", return_value=library):
        kernel = quantise.kernel(None, quantise.WORTH_COMPILING)
    assert kernel is not None
    for count in SIZES:
        weights = values(kind, count).to(dtype)
        packed, maxima = kernel(weights)
        codes, state = bnb.quantize_4bit(weights.float(), blocksize=64, quant_type="nf4")
        assert torch.equal(packed, codes.reshape(-1)), count
        assert torch.equal(maxima, state.absmax), count


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 70, 127, 129])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_values_that_are_not_finite_are_found(wrong: float, place: int, has_kernel: bool) -> None:
    weight = torch.randn(13, 10)
    weight.view(-1)[place] = wrong
    kernel = quantise.kernel(None, quantise.WORTH_COMPILING) if has_kernel else None
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantise(weight, kernel)


def test_maxima_whose_mean_is_too_large_are_found() -> None:
    with pytest.raises(ValueError, match="too large"):
        nf4.quantise(torch.full((64, 64), 3e38))


def test_a_small_model_does_not_wait_for_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(tmp_path))
    asked = []
    monkeypatch.setattr(build, "load", lambda **options: asked.append(options))
    assert quantise.kernel(tmp_path, quantise.WORTH_COMPILING - 1) is None
    assert not asked
    quantise.kernel(tmp_path, quantise.WORTH_COMPILING)
    assert asked == [{"directory": tmp_path}]
