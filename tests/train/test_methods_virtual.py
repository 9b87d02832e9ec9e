"""Virtual tokens train as PEFT's do, start where they should, and are saved as PEFT saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from loraplex_adapters.format.kinds import KINDS
from loraplex_model.base.refusal import Refusal
from loraplex_training.data.samples import MicroBatch
from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.methods.virtual import cached_rows
from loraplex_training.step.joint import JointPass, Part

from train import tiny

COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}

# name: our method, its options, PEFT's configuration
CASES: dict[str, tuple[str, dict[str, Any], peft.PeftConfig]] = {
    "prompt": ("prompt_tuning", {}, peft.PromptTuningConfig(**COMMON)),
    "mlp": (
        "p_tuning",
        {"encoder_hidden_size": 24},
        peft.PromptEncoderConfig(encoder_hidden_size=24, **COMMON),
    ),
    "lstm": (
        "p_tuning",
        {"encoder": "lstm", "encoder_hidden_size": 12, "encoder_num_layers": 2},
        peft.PromptEncoderConfig(
            encoder_reparameterization_type="LSTM", encoder_hidden_size=12, **COMMON
        ),
    ),
    "prefix": ("prefix_tuning", {}, peft.PrefixTuningConfig(**COMMON)),
    "projected prefix": (
        "prefix_tuning",
        {"prefix_projection": True, "encoder_hidden_size": 24},
        peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=24, **COMMON),
    ),
}
# A tied, biased base with wide heads, norms of heads, and a window that prefixes fall out of.
ON = [
    *(("llama", name) for name in CASES),
    ("qwen3", "prefix"),
    ("qwen3", "projected prefix"),
    ("llama-tied-bias", "prompt"),
    ("mistral-window", "prompt"),
    ("mistral-window", "prefix"),
]


def make(variant: str, name: str, **options: object) -> TrainedAdapter:
    method, own, _ = CASES[name]
    return tiny.make(method, variant, **{"num_virtual_tokens": 4, **own, **options})


def beside_peft(variant: str, name: str) -> tuple[TrainedAdapter, Any, dict[str, torch.Tensor]]:
    """Ours, PEFT's model that starts from the same, and its parameters by our names."""
    ours = make(variant, name)
    model = tiny.with_peft(copy.deepcopy(CASES[name][2]), variant)
    found = dict(model.prompt_encoder["default"].named_parameters())
    theirs = {key: found.pop(_name_there(key, name)) for key in ours.parameters}
    with torch.no_grad():
        for key, parameter in ours.parameters.items():
            assert theirs[key].shape == parameter.shape
            theirs[key].copy_(parameter)
    assert not found
    return ours, model, theirs


def _name_there(key: str, name: str) -> str:
    module, rest = key.split(".", 1)
    head = "transform" if "prefix" in name else "mlp_head"
    return f"{ {'head': head, 'lstm': 'lstm_head'}.get(module, module) }.{rest}"


@pytest.mark.parametrize(("variant", "name"), ON)
def test_the_first_gradient_equals_pefts(variant: str, name: str) -> None:
    ours, model, theirs = beside_peft(variant, name)
    batch = tiny.batch()
    loss = tiny.our_loss(ours, batch, variant)
    expected = model(**tiny.padded(batch)).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for key, parameter in theirs.items():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 1e-6, key
        assert tiny.relative(ours.parameters[key].grad, parameter.grad) < 1e-5, key


@pytest.mark.parametrize(("variant", "name"), ON[: len(CASES)])
def test_twenty_steps_equal_pefts(variant: str, name: str) -> None:
    ours, model, _ = beside_peft(variant, name)
    batches = [tiny.batch(0, (9, 6))] * 20
    found = tiny.our_losses(ours, batches, 1e-2, variant)
    expected = tiny.their_losses(model, batches, 1e-2)
    assert found[-1] < found[0] - 0.2
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_a_packed_batch_is_the_sum_of_single_ones(name: str) -> None:
    batch = tiny.batch()
    packed, single = make("llama", name), make("llama", name)
    joint = JointPass(tiny.base())
    total = joint.backward([Part(packed, batch)])
    sums = []
    for s in range(len(batch.starts) - 1):
        own = slice(batch.starts[s], batch.starts[s + 1])
        alone = MicroBatch(batch.tokens[own], (0, own.stop - own.start), batch.targets[own])
        sums += joint.backward([Part(single, alone)])
    assert total[0] == pytest.approx(sum(sums), rel=1e-6)
    for key, parameter in packed.parameters.items():
        assert tiny.relative(parameter.grad, single.parameters[key].grad) < 1e-5, key


def test_jobs_of_every_kind_side_by_side_have_the_gradients_that_they_have_alone() -> None:
    makers = [
        *(lambda name=name: make("llama", name) for name in CASES),
        lambda: tiny.make("lora", r=4),
        lambda: tiny.make("ia3"),
        lambda: tiny.make("bitfit"),
        lambda: tiny.make("bottleneck"),
    ]
    joint = JointPass(tiny.base())
    parts = [
        Part(maker(), tiny.batch(i, (5 + i, 12 - i)), weight=0.1 * (i + 1))
        for i, maker in enumerate(makers)
    ]
    bare = Part(None, tiny.batch(50))
    together = joint.backward([*parts[::2], bare, *parts[1::2]])
    ordered = [*parts[::2], bare, *parts[1::2]]
    for part, loss in zip(ordered, together, strict=True):
        if part is bare:
            assert loss == pytest.approx(joint.losses([bare])[0], rel=1e-6)
            continue
        alone = makers[parts.index(part)]()
        expected = joint.backward([Part(alone, part.batch, part.weight)])[0]
        assert loss == pytest.approx(expected, rel=1e-6)
        for key, parameter in part.adapter.parameters.items():
            wanted = alone.parameters[key].grad
            assert wanted is not None
            if wanted.norm() == 0:  # matrices before one that is still zero
                assert parameter.grad.norm() == 0, key
            else:
                assert tiny.relative(parameter.grad, wanted) < 1e-5, key


@pytest.mark.parametrize(("variant", "name"), ON)
def test_what_is_saved_answers_as_what_was_trained(variant: str, name: str, tmp_path: Path) -> None:
    adapter = make(variant, name)
    tiny.disturb(adapter)
    found = tiny.our_logits(adapter.delta(), variant)
    assert (found - tiny.our_logits(None, variant)).abs().max() > 1e-2
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory, variant), variant)
    torch.testing.assert_close(served, found, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory, variant))
    torch.testing.assert_close(found, theirs, atol=3e-5, rtol=1e-5)


def test_a_prompt_from_a_text_opens_without_its_tokenizer(tmp_path: Path) -> None:
    adapter = tiny.make("prompt_tuning", num_virtual_tokens=9, init_text="some words")
    directory = tiny.save(adapter, tmp_path)
    found = tiny.our_logits(tiny.opened_by_us(directory))
    theirs = tiny.their_logits(tiny.opened_by_peft(directory))
    torch.testing.assert_close(found, theirs, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_only_what_the_encoder_puts_out_is_saved(name: str) -> None:
    tensors = make("llama", name).files().tensors
    width = 64 if "prefix" not in name else 2 * 3 * 32
    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        "prompt_embeddings": ((4, width), torch.float32)
    }


@pytest.mark.parametrize("name", CASES)
def test_what_the_configuration_says_is_all_known(name: str) -> None:
    config = make("llama", name).files().config
    kind = KINDS[config["peft_type"]]
    common = {"base_model_name_or_path", "inference_mode", "peft_type", "task_type"}
    assert config.keys() - common <= kind.options.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_same_seed_gives_the_same_start_and_state_brings_it_back(name: str) -> None:
    torch.manual_seed(1)
    one = make("llama", name)
    torch.manual_seed(2)
    assert tiny.files_are_equal(one, make("llama", name))
    other = tiny.make(CASES[name][0], seed=5, num_virtual_tokens=4, **CASES[name][1])
    assert not tiny.files_are_equal(one, other)
    tiny.our_losses(one, [tiny.batch()] * 2, 1e-2)
    tiny.same_after_restoring(one, other)
    assert tiny.files_are_equal(one, other)


@pytest.mark.parametrize("text", ["some words", "of", "rather more words than virtual tokens"])
@pytest.mark.parametrize("variant", ["llama", "llama-rope-yarn", "mistral-window", "qwen3"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_start_from_a_text_equals_that_text_before_the_prompt(
    method: str, variant: str, text: str
) -> None:
    adapter = tiny.make(method, variant, num_virtual_tokens=9, init_text=text)
    ids = (list(text.encode()) * 9)[:9]
    expected = tiny.our_logits(None, variant, (*ids, *tiny.PROMPT))[9:]
    torch.testing.assert_close(
        tiny.our_logits(adapter.delta(), variant), expected, atol=1e-5, rtol=1e-5
    )


def test_without_a_text_a_prompt_starts_from_words_of_the_vocabulary() -> None:
    (rows,) = tiny.make("prompt_tuning", num_virtual_tokens=200).parameters.values()
    equal = (rows.detach()[:, None] == tiny.base().embed).all(-1)
    assert equal.any(1).all()
    assert equal.any(0).sum() > 50


def test_without_a_text_a_prefix_starts_from_words_of_the_vocabulary() -> None:
    """The values of the first layer are a word's own, whatever stands before it."""
    (rows,) = tiny.make("prefix_tuning", num_virtual_tokens=50).parameters.values()
    words = cached_rows(tiny.base(), range(128))
    values = slice(32, 64)
    distances = torch.cdist(rows.detach()[:, values], words[:, values]).min(1)
    assert distances.values.max() < 1e-2
    assert len(distances.indices.unique()) > 25


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_random_start_is_pefts(method: str) -> None:
    (rows,) = tiny.make(method, num_virtual_tokens=200, init="random").parameters.values()
    assert rows.detach().mean().abs() < 0.05
    assert 0.95 < rows.detach().std() < 1.05


@pytest.mark.parametrize("name", ["mlp", "lstm", "projected prefix"])
def test_an_encoder_starts_with_the_spread_of_pefts(name: str) -> None:
    ours = make("llama", name)
    fresh = tiny.with_peft(copy.deepcopy(CASES[name][2])).prompt_encoder["default"]
    own = dict(fresh.named_parameters())
    for key, parameter in ours.parameters.items():
        expected = own[_name_there(key, name)].detach()
        assert parameter.detach().std() == pytest.approx(float(expected.std()), rel=0.35), key
        if key != "embedding.weight":  # uniform: within a bound
            bound = float(expected.abs().max())
            assert parameter.detach().abs().max() == pytest.approx(bound, rel=0.35), key


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_can_start_at_zero(projected: bool) -> None:
    adapter = tiny.make("prefix_tuning", init="zero", prefix_projection=projected)
    assert adapter.files().tensors["prompt_embeddings"].abs().max() == 0
    assert adapter.files().config["init_weights"] == "zero"


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("prompt_tuning", {"num_virtual_tokens": 0}, ["num_virtual_tokens"]),
        ("prompt_tuning", {"init": "text"}, ["init_text"]),
        ("prompt_tuning", {"init": "zero"}, ["init"]),
        ("prompt_tuning", {"init": "random", "init_text": "words"}, ["init_text"]),
        ("prompt_tuning", {"num_tokens": 4, "init": "txt"}, ["num_tokens", "init"]),
        ("p_tuning", {"encoder": "gru"}, ["encoder"]),
        ("p_tuning", {"encoder_num_layers": 3}, ["encoder_num_layers"]),
        ("prefix_tuning", {"encoder_hidden_size": 8}, ["encoder_hidden_size"]),
        ("prefix_tuning", {"prefix_projection": True, "init": "text"}, ["init"]),
        ("prefix_tuning", {"prefix_projection": True, "init_text": "words"}, ["init_text"]),
    ],
)
def test_wrong_options_are_told_all_at_once(
    method: str, options: dict[str, object], told: list[str]
) -> None:
    with pytest.raises(Refusal) as caught:
        tiny.make(method, **options)
    assert caught.value.reason == "METHOD_INVALID"
    assert len(caught.value.messages) == len(told)
    for name in told:
        assert any(name in problem for problem in caught.value.messages)


@pytest.mark.fault("virtual-tokens-beyond-context")
@pytest.mark.parametrize("name", CASES)
def test_what_no_server_could_use_is_not_trained(name: str) -> None:
    """The base has 256 positions; one is for the prompt and one for the answer."""
    make("llama", name, num_virtual_tokens=254)
    with pytest.raises(Refusal, match="at most 254") as caught:
        make("llama", name, num_virtual_tokens=255)
    assert caught.value.reason == "METHOD_INVALID"
    assert caught.value.field == "method.num_virtual_tokens"
