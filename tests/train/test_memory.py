"""The estimate of memory counts what the pass keeps."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_training.step import memory
from loraplex_training.step.joint import JointPass, Part
from loraplex_training.step.memory import AdapterSize, estimate

from train import tiny

RANK = 4
RANKS = 7 * RANK


@cache
def base(variant: str) -> BaseWeights:
    path = tiny.checkpoint(variant)
    return load_base(str(path), torch.float32, path.parent / "cache").weights


def kept_bytes(joint: JointPass, part: Part) -> int:
    """What autograd holds between the two halves of a pass, of storages made in the first."""
    given = {p.untyped_storage().data_ptr() for p in part.adapter.parameters.values()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        joint.backward([part])
    return sum(held.values())


@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_token_keeps_is_what_autograd_holds(variant: str, checkpointing: bool) -> None:
    """The difference between two lengths, in which everything else cancels."""
    adapter = tiny.make("lora", variant, r=RANK, target_modules="all-linear")
    joint = JointPass(base(variant), checkpointing=checkpointing)

    def held(tokens: int) -> int:
        batch = tiny.batch(1, [tokens])
        return kept_bytes(joint, Part(adapter, batch))

    def reckoned(tokens: int) -> int:
        size = AdapterSize(0, ranks=RANKS)
        kept = estimate(base(variant), tokens, [size]).items["activations"]
        if not checkpointing:
            return kept
        # The estimate has the layer that is computed again in addition.
        sparing = estimate(base(variant), tokens, [size], checkpointing).items["activations"]
        return sparing - kept // base(variant).config.num_layers

    mine, wanted = reckoned(160) - reckoned(80), held(160) - held(80)
    assert mine == pytest.approx(wanted, rel=0.1)


def test_items_follow_what_they_are_for() -> None:
    weights = base("llama")
    one, two = AdapterSize(1000), AdapterSize(1000, optimiser="adamw8bit")
    items = estimate(weights, 100, [one]).items
    assert items["base"] == weights.nbytes
    assert items["adapters"] == 1000 * 20
    assert estimate(weights, 100, [one, two]).items["adapters"] == 1000 * (20 + 14)
    more = estimate(weights, 200, [one])
    assert more.items["activations"] == 2 * items["activations"]
    sparing = estimate(weights, 200, [one], checkpointing=True)
    assert sparing.items["activations"] < more.items["activations"]
    assert sparing.total < more.total == sum(more.items.values())
    few = estimate(weights, 200, [one], learned=10)
    assert few.items["loss"] < more.items["loss"]
    head = estimate(weights, 200, [AdapterSize(1000, head=True)])
    assert head.items["loss"] > more.items["loss"]


def test_the_peak_does_not_fall() -> None:
    before = memory.peak_bytes()
    block = torch.ones(16 << 20)
    after = memory.peak_bytes()
    del block
    assert 0 < before <= after == memory.peak_bytes()
