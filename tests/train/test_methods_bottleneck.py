"""Bottlenecks train as modules of torch behind transformers' blocks do, and are saved in our form.

PEFT has none; the oracle is `adapters.bottlenecks`: hooks on the Hugging Face model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.base import TrainedAdapter

from adapters import bottlenecks
from train import tiny

CASES: dict[str, dict[str, Any]] = {
    "houlsby": {"style": "houlsby", "non_linearity": "silu", "scaling": 0.5},
    "pfeiffer": {"style": "pfeiffer", "reduction_factor": 4},
    "parallel": {
        "style": "parallel",
        "bottleneck_size": 7,
        "scaling": 4,
        "non_linearity": "relu",
    },
    "incoming": {"placements": "mlp,attention", "reads": "incoming", "non_linearity": "gelu"},
    "some layers": {"leave_out": "1", "non_linearity": "tanh"},
}
ON = [*(("llama", name) for name in CASES), ("llama-tied-bias", "houlsby"), ("qwen3", "parallel")]


def beside_hooks(adapter: TrainedAdapter, variant: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """transformers' model with the same bottlenecks, and their parameters by our names."""
    model = tiny.model(variant).requires_grad_(False)
    files = adapter.files()
    tensors = {name: tensor.requires_grad_() for name, tensor in files.tensors.items()}
    bottlenecks.attach_tensors(model, files.config, tensors)
    return model, tensors


def made(name: str, variant: str) -> TrainedAdapter:
    """An adapter that has already learned something: at the start only `up` has a gradient."""
    adapter = tiny.make("bottleneck", variant, **CASES[name])
    tiny.disturb(adapter)
    return adapter


@pytest.mark.parametrize(("variant", "name"), ON)
def test_gradients_equal_those_of_hooks(variant: str, name: str) -> None:
    ours = made(name, variant)
    model, theirs = beside_hooks(ours, variant)
    assert theirs.keys() == ours.parameters.keys()
    batch = tiny.batch()
    loss = tiny.our_loss(ours, batch, variant)
    expected = model(**tiny.padded(batch)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for key, parameter in theirs.items():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 1e-5, key
        assert tiny.relative(ours.parameters[key].grad, parameter.grad) < 1e-5, key


@pytest.mark.parametrize("name", ["houlsby", "parallel"])
def test_twenty_steps_equal_those_of_hooks(name: str) -> None:
    ours = tiny.make("bottleneck", **CASES[name])
    model, theirs = beside_hooks(ours, "llama")
    optimiser = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    batches = [tiny.batch(0, (9, 6))] * 20
    found = tiny.our_losses(ours, batches, 1e-2)
    assert found[-1] < found[0] - 0.2
    assert found == pytest.approx(tiny.their_losses(model, batches, optimiser=optimiser), abs=1e-4)


@pytest.mark.parametrize(("variant", "name"), ON)
def test_it_changes_nothing_at_the_start_and_only_up_has_a_gradient(
    variant: str, name: str
) -> None:
    adapter = tiny.make("bottleneck", variant, **CASES[name])
    found = tiny.our_logits(adapter.delta(), variant)
    assert torch.equal(found, tiny.our_logits(None, variant))
    tiny.our_loss(adapter, tiny.batch(), variant)
    for key, parameter in adapter.parameters.items():
        assert (parameter.grad.norm() > 1e-5) == ("bottleneck_up" in key), key


@pytest.mark.parametrize(("variant", "name"), ON)
def test_what_is_saved_answers_as_what_was_trained(variant: str, name: str, tmp_path: Path) -> None:
    adapter = made(name, variant)
    found = tiny.our_logits(adapter.delta(), variant)
    assert (found - tiny.our_logits(None, variant)).abs().max() > 1e-2
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory, variant), variant)
    torch.testing.assert_close(served, found, atol=1e-5, rtol=1e-5)
    model = tiny.model(variant)
    bottlenecks.attach(model, directory)
    torch.testing.assert_close(found, tiny.their_logits(model), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "placements", "reads", "width"),
    [
        ({}, ["mlp"], "stream", 4),
        ({"style": "houlsby"}, ["attention", "mlp"], "output", 4),
        ({"style": "parallel", "reduction_factor": 3}, ["mlp"], "normed", 21),
        ({"style": "pfeiffer", "placements": "attention"}, ["attention"], "stream", 4),
        ({"reduction_factor": 1000}, ["mlp"], "stream", 1),
    ],
)
def test_styles_are_those_of_the_papers(
    options: dict[str, object], placements: list[str], reads: str, width: int
) -> None:
    files = tiny.make("bottleneck", **options).files()
    assert files.config["placements"] == placements
    assert files.config["reads"] == reads
    assert files.config["bottleneck_size"] == width
    assert len(files.tensors) == 4 * 3 * len(placements)
    downs = [t for key, t in files.tensors.items() if key.endswith("down.weight")]
    assert {t.shape for t in downs} == {(width, 64)}


def test_weight_decay_spares_the_biases() -> None:
    decayed, spared = tiny.make("bottleneck").groups()
    assert decayed.decay
    assert not spared.decay
    assert all(name.endswith(".weight") for name in decayed.names)
    assert all(name.endswith(".bias") for name in spared.names)
    assert len(decayed.names) == len(spared.names) == 6


def test_the_same_seed_gives_the_same_start_and_state_brings_it_back() -> None:
    torch.manual_seed(1)
    one = tiny.make("bottleneck")
    torch.manual_seed(2)
    assert tiny.files_are_equal(one, tiny.make("bottleneck"))
    other = tiny.make("bottleneck", seed=3)
    assert not tiny.files_are_equal(one, other)
    tiny.our_losses(one, [tiny.batch()] * 2, 1e-2)
    tiny.same_after_restoring(one, other)
    assert tiny.files_are_equal(one, other)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"style": "houlsbi"}, ["style"]),
        ({"placements": "attn"}, ["placements"]),
        ({"bottleneck_size": 8, "reduction_factor": 8}, ["bottleneck_size"]),
        ({"bottleneck_size": AdapterLimits().max_rank + 1}, ["bottleneck_size"]),
        ({"reduction_factor": 0.125}, ["reduction_factor"]),
        ({"leave_out": "0-2"}, ["leave_out"]),
        ({"leave_out": "3", "non_linearity": "mish"}, ["leave_out", "non_linearity"]),
    ],
)
def test_wrong_options_are_told_all_at_once(options: dict[str, object], told: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        tiny.make("bottleneck", **options)
    assert caught.value.reason == "METHOD_INVALID"
    assert len(caught.value.messages) == len(told)
    for name in told:
        assert any(name in problem for problem in caught.value.messages)
