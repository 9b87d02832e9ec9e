"""AdaLoRA: scores, cuts and penalties are PEFT's, step by step, and so are the files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.base import TrainedAdapter

from train import tiny

STEPS = 20
MODULES = 12
OPTIONS: dict[str, Any] = {
    "init_r": 6,
    "target_r": 2,
    "lora_alpha": 9,
    "tinit": 3,
    "tfinal": 5,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.7,
    "orth_reg_weight": 0.3,
}
EXAMPLES = tiny.batches(4) * 5


def make(seed: int = 0, **changes: object) -> TrainedAdapter:
    options = {**OPTIONS, "target_modules": "attention", **changes}
    return tiny.make("adalora", steps=STEPS, seed=seed, **options)


def in_peft(**changes: object) -> Any:
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    options = {**OPTIONS, "target_modules": names, "total_step": STEPS, **changes}
    return tiny.with_peft(peft.AdaLoraConfig(task_type="CAUSAL_LM", **options))


def pattern(adapter: TrainedAdapter) -> Any:
    return adapter.files().config["rank_pattern"]


def test_gradients_equal_pefts() -> None:
    adapter, model = make(), in_peft()
    tiny.disturb(adapter)
    tiny.share(adapter, model)
    loss = tiny.our_loss(adapter, tiny.batch())
    expected = model(**tiny.padded(tiny.batch())).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = tiny.their_parameters(model)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None
        assert tiny.relative(parameter.grad, theirs[name].grad) < 1e-5, name


def test_twenty_steps_cut_what_peft_cuts(tmp_path: Path) -> None:
    """Losses, the triplets left after every step, and what both save in the end."""
    adapter, model = make(), in_peft()
    tiny.share(adapter, model)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    ours, theirs, left = [], [], []
    own = torch.optim.AdamW(adapter.parameters.values(), lr=1e-2, weight_decay=0.0)
    for step, examples in enumerate(EXAMPLES, 1):
        ours.append(tiny.our_loss(adapter, examples))
        own.step()
        adapter.stepped(step)
        own.zero_grad()
        loss = model(**tiny.padded(examples)).loss
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        theirs.append(float(loss.detach()))
        masks = {
            name: (p[:, 0] != 0).tolist()
            for name, p in tiny.their_parameters(model).items()
            if "lora_E" in name
        }
        found = {n: (p[:, 0] != 0).tolist() for n, p in adapter.parameters.items() if n in masks}
        assert found == masks, step
        left.append(sum(map(sum, masks.values())))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert left[:3] == [72, 72, 72]
    assert left[-6:] == [24] * 6
    assert 24 < left[7] < left[3] < 72

    model.create_or_update_model_card = lambda _: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes modules without any rank for lost shards
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    files = adapter.files()
    assert files.config["rank_pattern"] == config["rank_pattern"]
    for name in ("init_r", "lora_alpha", "peft_type", "task_type", "total_step", "tinit"):
        assert files.config[name] == config[name]
    expected = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert files.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(files.tensors[name], tensor, atol=2e-5, rtol=1e-4)


def test_the_start_is_the_base() -> None:
    with torch.no_grad():
        assert torch.equal(tiny.our_logits(make().delta()), tiny.our_logits(None))


def test_ranks_sum_to_the_budget_and_may_be_none(tmp_path: Path) -> None:
    adapter = make(target_r=1, init_r=4, target_modules="all-linear", tinit=1, tfinal=16)
    tiny.our_losses(adapter, EXAMPLES[:5], 1e-2)
    ranks = [sum(mask) for mask in pattern(adapter).values()]
    assert len(ranks) == 21
    assert sum(ranks) == 21 * 1
    assert 0 in ranks
    assert max(ranks) > 1
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta())
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory))
    torch.testing.assert_close(theirs, trained, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_a_job_that_stops_early_is_saved_as_it_is(steps: int, tmp_path: Path) -> None:
    """Before any cut, right after one, and where triplets have come back since."""
    adapter = make()
    tiny.our_losses(adapter, EXAMPLES[:steps], 1e-2)
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta())
    served = tiny.our_logits(tiny.opened_by_us(tiny.save(adapter, tmp_path)))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)


def test_scores_that_are_equal_do_not_cut_more_than_the_budget() -> None:
    adapter = make()
    for parameter in adapter.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(1, STEPS + 1):
        adapter.stepped(step)
    assert sum(sum(mask) for mask in pattern(adapter).values()) == MODULES * OPTIONS["target_r"]


def test_going_on_from_a_state_is_exact() -> None:
    """Taken between two cuts; without it, others are made."""
    adapter, other, forgetful = (make(seed=seed, tfinal=12) for seed in (1, 2, 3))
    tiny.our_losses(adapter, EXAMPLES[:5], 1e-2)
    tiny.same_after_restoring(adapter, other)
    assert tiny.files_are_equal(adapter, other)
    with torch.no_grad():
        for name, parameter in forgetful.parameters.items():
            parameter.copy_(adapter.parameters[name])
    for one in (adapter, other, forgetful):
        tiny.our_losses(one, EXAMPLES[5:9], 1e-2, after=5)
    assert tiny.files_are_equal(adapter, other)
    assert pattern(adapter) != pattern(forgetful)


def test_a_schedule_without_steps_to_cut_in_is_refused() -> None:
    with pytest.raises(Refusal, match="leave none of the job's 20 to cut ranks in"):
        make(tinit=15)
    with pytest.raises(Refusal, match="target_r is 7; it should be at most 6"):
        make(target_r=7)
