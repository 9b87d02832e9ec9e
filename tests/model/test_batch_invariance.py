"""On the CPU a row's logits have the same bits whatever its neighbours and its chunks are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, LoraFactors, ProjectionDelta, lora
from loraplex_model.adapters.pack import pack
from model.conftest import Load
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids

from model import tiny

pytestmark = pytest.mark.parametrize("variant", ["llama", "qwen3-window-bias"])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def decoder(
    request: pytest.FixtureRequest, variant: str, decoder_class: Any, load_tiny: Load
) -> Any:
    dtype = request.param
    if dtype == torch.bfloat16 and getattr(decoder_class, "__name__", "") != "NativeDecoder":
        pytest.skip("only the native decoder has products of bfloat16 in a fixed order")
    weights = load_tiny(variant, dtype).weights
    decoder = decoder_class(weights, NUM_BLOCKS, BLOCK_SIZE, 3)
    random = torch.Generator().manual_seed(1)
    for slot, rank in enumerate((4, 16, 35)):
        modules = {
            (layer, name): LoraFactors(
                0.1 * torch.randn(rank, fan_in, generator=random),
                0.1 * torch.randn(fan_out, rank, generator=random),
                1.0,
            )
            for layer in range(weights.config.num_layers)
            for name, (fan_in, fan_out) in weights.config.projection_shapes().items()
        }
        delta = lora(modules)
        if slot == 2:  # with all that a projection can have
            delta = AdapterDelta(
                {site: whole(change, random) for site, change in delta.sites.items()}
            )
        decoder.table.publish(slot, pack(delta, dtype))
    return decoder


def whole(change: Any, random: torch.Generator) -> ProjectionDelta:
    """The factors of a change with a gain and a bias."""
    gain, bias = torch.randn(2, change.b.shape[1], generator=random)
    return ProjectionDelta(a=change.a, b=change.b, gain=1 + 0.1 * gain, bias=0.1 * bias)


def alone(decoder: Any, mix: Any, ids: list[int]) -> torch.Tensor:
    sequence = Sequence(ids, mix)
    driver = Driver(decoder)
    driver.step((sequence, len(ids) - 1))
    driver.step((sequence, 1))
    return torch.cat(sequence.logits)


MIXES = [(), ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (2, -1.5))]


@pytest.mark.parametrize("mix", MIXES, ids=["base", "rank4", "rank16", "blend"])
@pytest.mark.parametrize("neighbours", [1, 4, 13])
def test_neighbours_change_no_bit(decoder: Any, mix: Any, neighbours: int) -> None:
    ids = token_ids(3, 21, tiny.VOCAB)
    expected = alone(decoder, mix, ids)
    sequence = Sequence(ids, mix)
    others = [
        Sequence(token_ids(50 + i, 7 + i, tiny.VOCAB), MIXES[i % 4]) for i in range(neighbours)
    ]
    driver = Driver(decoder, seed=neighbours)
    driver.step((others[0], 3), (sequence, 20), *((other, 4) for other in others[1:]))
    driver.step(*((other, 1) for other in others), (sequence, 1))
    assert torch.equal(torch.cat(sequence.logits), expected)


@pytest.mark.parametrize("mix", MIXES, ids=["base", "rank4", "rank16", "blend"])
@pytest.mark.parametrize("chunks", [(1,) * 21, (5, 16), (2, 3, 11, 5)], ids=str)
def test_chunks_change_no_bit(decoder: Any, mix: Any, chunks: tuple[int, ...]) -> None:
    ids = token_ids(3, 21, tiny.VOCAB)
    expected = alone(decoder, mix, ids)
    sequence = Sequence(ids, mix)
    driver = Driver(decoder, seed=7)
    for n in chunks:
        driver.step((sequence, n))
    assert torch.equal(torch.cat(sequence.logits), expected)
