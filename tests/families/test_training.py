"""Training on every family gives the losses and the gradients that PEFT gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from families import variants
from loraplex_model.adapters.mix import Dropout
from loraplex_model.base.config import FUSED
from loraplex_training.step.joint import Part
from train import tiny
from train.test_methods_lora_fishmask import Observed

pytestmark = pytest.mark.slow

JOINED = ("phi3", "phi4-mini", "glm4")
LONG = (30, 9, 14)
"""Lengths of examples; the first is beyond the short context of the variant with LongRoPE."""


def same_gradients(variant: str, method: str, **options: object) -> None:
    """Compares losses and gradients of LoRA on all linear modules with PEFT's."""
    adapter = tiny.make(method, variant, r=4, target_modules="all-linear")
    names = sorted({name.split(".")[-3] for name in adapter.parameters if "lora_A" in name})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, **options
    )
    model = tiny.with_peft(config, variant)
    tiny.disturb(adapter)
    tiny.share(adapter, model)
    # transformers rotates a whole batch by its longest sequence.
    lengths = LONG if variant != "phi4-mini" else (30, 27)
    examples = tiny.batch(lengths=lengths)
    loss = tiny.our_loss(adapter, examples, variant)
    expected = model(**tiny.padded(examples)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=2e-6)
    theirs = tiny.their_parameters(model)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, name
        assert theirs[name].grad.norm() > 1e-5
        assert tiny.relative(parameter.grad, theirs[name].grad) < 3e-5, name


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_gradients_of_lora_equal_pefts(variant: str) -> None:
    same_gradients(variant, "lora")


@pytest.mark.parametrize("variant", JOINED)
def test_gradients_of_dora_on_joined_modules_equal_pefts(variant: str) -> None:
    same_gradients(variant, "dora", use_dora=True)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "bitfit", "fishmask"])
def test_what_is_trained_on_joined_modules_is_what_peft_opens(method: str, tmp_path: Path) -> None:
    variant = "phi3"
    adapter = tiny.make(method, variant, target_modules="all-linear")
    adapter.prepare(Observed(variant))
    tiny.disturb(adapter)
    directory = tiny.save(adapter, tmp_path / "adapter")
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta(), variant)
    opened = tiny.their_logits(tiny.opened_by_peft(directory, variant))
    assert (trained - opened).abs().max() < 3e-5
    served = tiny.our_logits(tiny.opened_by_us(directory, variant), variant)
    assert (trained - served).abs().max() < 3e-5
    assert (trained - tiny.our_logits(None, variant)).abs().max() > 1e-3


def test_parts_of_a_joined_module_drop_the_same_inputs() -> None:
    like = torch.empty(5, 64)
    joined = Dropout(0.5, 7, ("qkv", "gate_up"))
    apart = Dropout(0.5, 7)
    for first, *others in (FUSED["qkv"], FUSED["gate_up"]):
        for other in others:
            assert torch.equal(joined.mask((1, other), like), joined.mask((1, first), like))
            assert not torch.equal(apart.mask((1, other), like), apart.mask((1, first), like))
    assert not torch.equal(joined.mask((1, "o_proj"), like), joined.mask((1, "q_proj"), like))


def test_a_joined_base_trains_with_the_masks_of_joined_modules() -> None:
    adapter = tiny.make("lora", "phi3", r=4, target_modules="qkv_proj", lora_dropout=0.5)
    part = Part(adapter, tiny.batch(), 1.0, torch.Generator())
    seen: list[Dropout | None] = []
    rows = tiny.joint("phi3")._lay_out

    def looked(parts: Any) -> Any:
        seen.extend(dropout for _, _, dropout in parts)
        return rows(parts)

    with mock.patch.object(tiny.joint("phi3"), "_lay_out", looked):
        tiny.joint("phi3").backward([part])
    assert [dropout.joined for dropout in seen if dropout] == [("qkv", "gate_up")]
