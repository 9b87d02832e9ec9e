"""NF4 bytes and values are those of bitsandbytes, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from loraplex_model.base.weights import NF4Matrix
from loraplex_model.ops import nf4

SHAPES = [(128, 64), (96, 192), (1028, 64), (3, 64)]
CROSSING = [(96, 80), (33, 48), (7, 16), (1, 16)]
"""Shapes in which blocks cross row ends."""


def weight(out: int, fan_in: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(out * fan_in)
    return torch.randn(out, fan_in, generator=random) * 0.02


def theirs(matrix: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")


def test_the_codes_are_bitsandbytes_own() -> None:
    assert torch.equal(nf4.nf4_code(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES + CROSSING, ids=str)
def test_quantising_gives_bitsandbytes_bytes(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "_CHUNK", 64 * 7)  # several chunks, the last one short
    packed, state = theirs(weight(*shape))
    ours = nf4.quantise(weight(*shape))
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.absmax_scales[0], state.state2.absmax)
    assert ours.absmax_offsets == (state.offset.item(),)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantising_gives_bitsandbytes_values(shape: tuple[int, int]) -> None:
    packed, state = theirs(weight(*shape))
    ours = nf4.quantise(weight(*shape))
    assert torch.equal(nf4.dequantize(ours), bnb.dequantize_4bit(packed, state))
    maxima = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(nf4.absmax_float(ours).reshape(-1), maxima)


@pytest.mark.parametrize("shape", CROSSING, ids=str)
def test_blocks_may_cross_rows(shape: tuple[int, int]) -> None:
    """Compared to the same weights as one row of whole blocks and a rest."""
    out, fan_in = shape
    flat = torch.nn.functional.pad(weight(*shape).reshape(1, -1), (0, -out * fan_in % 64))
    padded = nf4.dequantize(nf4.quantise(flat)).reshape(-1)[: out * fan_in]
    ours = nf4.quantise(weight(*shape))
    assert torch.equal(nf4.dequantize(ours).reshape(-1), padded)
    with pytest.raises(ValueError, match="whole blocks"):
        nf4.absmax_float(ours)


def test_a_stack_is_its_modules_side_by_side() -> None:
    parts = [nf4.quantise(weight(out, 64)) for out in (128, 32, 1028)]
    stacked = nf4.stack(parts)
    assert stacked.shape == (1188, 64)
    assert stacked.rows == (128, 32, 1028)
    assert torch.equal(nf4.dequantize(stacked), torch.cat([nf4.dequantize(p) for p in parts]))
    assert torch.equal(nf4.absmax_float(stacked), torch.cat([nf4.absmax_float(p) for p in parts]))


def test_maxima_that_were_quantised_once_are_read_as_they_are() -> None:
    packed, state = bnb.quantize_4bit(weight(96, 64), blocksize=64, quant_type="nf4")
    plain = NF4Matrix((96, 64), packed.reshape(-1), state.absmax, (), (), (96,))
    assert torch.equal(nf4.dequantize(plain), bnb.dequantize_4bit(packed, state))


def test_a_stack_may_have_modules_with_and_without_double_quantisation() -> None:
    packed, state = bnb.quantize_4bit(weight(96, 64), blocksize=64, quant_type="nf4")
    plain = NF4Matrix((96, 64), packed.reshape(-1), state.absmax, (), (), (96,))
    parts = [nf4.quantise(weight(33, 64)), plain, nf4.quantise(weight(17, 64))]
    stacked = nf4.stack(parts)
    assert torch.equal(nf4.dequantize(stacked), torch.cat([nf4.dequantize(p) for p in parts]))
