"""(IA)3 and BitFit train as PEFT's do, change nothing at the start, and are saved as PEFT's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from loraplex_model.base.refusal import Refusal

from train import tiny

TIED = "llama-tied-bias"
SQUARES = {
    "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj"],
    "feedforward_modules": ["o_proj", "gate_proj"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name: our method, its options, PEFT's configuration class and its options
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "ia3": ("ia3", {}, "IA3Config", {}),
    "ia3 on squares": ("ia3", SQUARES, "IA3Config", SQUARES),
    "ia3 without feed-forward": (
        "ia3",
        {"target_modules": "q_proj"},
        "IA3Config",
        {"target_modules": ["q_proj"], "feedforward_modules": []},
    ),
    "bitfit": ("bitfit", {}, "BeftConfig", {"target_modules": ALL}),
    "bitfit where biases are": (
        "bitfit",
        {"target_modules": "attention"},
        "BeftConfig",
        {"target_modules": BIASED},
    ),
}
ON = [
    ("llama", "ia3"),
    ("llama", "bitfit"),
    ("qwen3", "ia3 on squares"),
    (TIED, "ia3 on squares"),
    (TIED, "ia3 without feed-forward"),
    (TIED, "bitfit where biases are"),
]


def beside_peft(variant: str, name: str) -> tuple[Any, Any]:
    """Ours, and PEFT's model that starts from the same."""
    method, options, kind, theirs = CASES[name]
    ours = tiny.make(method, variant, **options)
    model = tiny.with_peft(getattr(peft, kind)(task_type="CAUSAL_LM", **theirs), variant)
    tiny.share(ours, model)
    return ours, model


@pytest.mark.parametrize(("variant", "name"), ON)
def test_the_first_gradient_equals_pefts(variant: str, name: str) -> None:
    ours, model = beside_peft(variant, name)
    batch = tiny.batch()
    loss = tiny.our_loss(ours, batch, variant)
    expected = model(**tiny.padded(batch)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for key, parameter in tiny.their_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 1e-5, key
        assert tiny.relative(ours.parameters[key].grad, parameter.grad) < 1e-5, key


@pytest.mark.parametrize(("variant", "name"), ON[:2])
def test_twenty_steps_equal_pefts(variant: str, name: str) -> None:
    ours, model = beside_peft(variant, name)
    batches = [tiny.batch(0, (9, 6))] * 20
    found = tiny.our_losses(ours, batches, 1e-2, variant)
    assert found[-1] < found[0] - 0.2
    assert found == pytest.approx(tiny.their_losses(model, batches, 1e-2), abs=1e-4)


@pytest.mark.parametrize(("variant", "name"), ON)
def test_it_changes_nothing_at_the_start(variant: str, name: str) -> None:
    adapter = tiny.make(CASES[name][0], variant, **CASES[name][1])
    found = tiny.our_logits(adapter.delta(), variant)
    torch.testing.assert_close(found, tiny.our_logits(None, variant), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("variant", "name"), ON)
def test_what_is_saved_answers_as_what_was_trained(variant: str, name: str, tmp_path: Path) -> None:
    adapter = tiny.make(CASES[name][0], variant, **CASES[name][1])
    tiny.disturb(adapter, 0.1)
    found = tiny.our_logits(adapter.delta(), variant)
    assert (found - tiny.our_logits(None, variant)).abs().max() > 1e-2
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory, variant), variant)
    torch.testing.assert_close(served, found, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory, variant))
    torch.testing.assert_close(found, theirs, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_targets_are_saved_as_whole_paths_of_the_chosen_layers(method: str) -> None:
    options = {"target_modules": "down_proj", "layers": "0,2"}
    files = tiny.make(method, **options).files()
    paths = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 2)]
    assert files.config["target_modules"] == paths
    if method == "ia3":
        assert files.config["feedforward_modules"] == paths
    endings = {"ia3": "ia3_l", "bitfit": "beft_bias"}
    names = [f"base_model.model.{path}.{endings[method]}" for path in paths]
    assert list(files.tensors) == names


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_weight_decay_spares_them(method: str) -> None:
    adapter = tiny.make(method)
    groups = adapter.groups()
    assert [group.decay for group in groups] == [False]
    assert groups[0].names == tuple(adapter.parameters)


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_state_brings_it_back(method: str) -> None:
    one, other = tiny.make(method), tiny.make(method)
    tiny.our_losses(one, [tiny.batch()] * 2, 1e-2)
    assert not tiny.files_are_equal(one, other)
    tiny.same_after_restoring(one, other)
    assert tiny.files_are_equal(one, other)


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("ia3", {"feedforward_modules": "gate_proj"}, ["gate_proj"]),
        ("ia3", {"target_modules": "k_prj", "r": 8}, ["k_prj", "'r'"]),
        ("bitfit", {"target_modules": "lm_head"}, ["lm_head"]),
        ("bitfit", {"layers": "7"}, ["layer 7"]),
    ],
)
def test_wrong_options_are_told_all_at_once(
    method: str, options: dict[str, object], told: list[str]
) -> None:
    with pytest.raises(Refusal) as caught:
        tiny.make(method, **options)
    assert caught.value.reason == "METHOD_INVALID"
    for name in told:
        assert any(name in problem for problem in caught.value.messages)
