"""LoRA in all its shapes, and DoRA, learn what PEFT learns and are saved as PEFT reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.base import TrainedAdapter
from peft.optimizers import create_loraplus_optimizer

from train import tiny

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """Our options and PEFT's, of the same adapter."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    method: str = "lora"
    variant: str = "llama"

    def make(self) -> TrainedAdapter:
        return tiny.make(self.method, self.variant, **self.ours)

    def peft(self) -> Any:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **self.theirs)
        return tiny.with_peft(config, self.variant)


ALL = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 7, "layers.1.self_attn.q_proj": 12},
    "alpha_pattern": {"o_proj": 20},
}
CASES = {
    "all-linear": Case({"r": 4}, ALL),
    "rslora": Case({"r": 4, "use_rslora": True}, {**ALL, "use_rslora": True}),
    "qv": Case({**ALL, "target_modules": "qv"}, {**ALL, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": Case(
        {"r": 4, "lora_alpha": 6, "target_modules": "attention", **PATTERNS},
        {"r": 4, "lora_alpha": 6, "target_modules": QKVO, **PATTERNS},
    ),
    "some layers, from text": Case(
        {"r": "3", "lora_alpha": "5", "target_modules": "mlp,self_attn.q_proj", "layers": "0,2"},
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": [0, 2],
        },
    ),
    "tied base with biases": Case({"r": 4}, ALL, variant="llama-tied-bias"),
    "head": Case(
        {"r": 4, "target_modules": "v_proj,lm_head"},
        {**ALL, "target_modules": ["v_proj", "lm_head"]},
    ),
    "tied head": Case(
        {"r": 4, "target_modules": "v_proj,lm_head"},
        {**ALL, "target_modules": ["v_proj", "lm_head"]},
        variant="llama-tied-bias",
    ),
    "dora": Case({"r": 4}, {**ALL, "use_dora": True}, "dora"),
    "dora, rslora, patterns": Case(
        {"r": 4, "lora_alpha": 6, "target_modules": "attention", "use_rslora": True, **PATTERNS},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": QKVO,
            "use_rslora": True,
            "use_dora": True,
            **PATTERNS,
        },
        "dora",
    ),
    "dora on biases": Case({"r": 4}, {**ALL, "use_dora": True}, "dora", "qwen2"),
}
TWENTY_STEPS = ("some layers, from text", "patterns", "head", "dora, rslora, patterns")
SAVED = ("rslora", "tied head", *TWENTY_STEPS, "dora on biases")
RECURRING = tiny.batches(4) * 5


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_gradients_equal_pefts(case: Case) -> None:
    adapter, model = case.make(), case.peft()
    tiny.disturb(adapter)
    tiny.share(adapter, model)
    loss = tiny.our_loss(adapter, tiny.batch(), case.variant)
    expected = model(**tiny.padded(tiny.batch())).loss
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    theirs = tiny.their_parameters(model)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None, name
        assert theirs[name].grad.norm() > 1e-4
        assert tiny.relative(parameter.grad, theirs[name].grad) < 1e-5, name


@pytest.mark.parametrize("name", TWENTY_STEPS)
def test_losses_of_twenty_steps_equal_pefts(name: str) -> None:
    case = CASES[name]
    adapter, model = case.make(), case.peft()
    tiny.share(adapter, model)
    losses = tiny.our_losses(adapter, RECURRING, 1e-2, case.variant)
    assert losses == pytest.approx(tiny.their_losses(model, RECURRING, 1e-2), abs=1e-4)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_start_is_the_base_and_only_b_moves(case: Case) -> None:
    adapter = case.make()
    with torch.no_grad():
        logits = tiny.our_logits(adapter.delta(), case.variant)
    assert torch.equal(logits, tiny.our_logits(None, case.variant))
    tiny.our_loss(adapter, tiny.batch(), case.variant)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) != ("lora_A" in name), name


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_what_was_trained(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapter = case.make()
    tiny.our_losses(adapter, tiny.batches(2), 1e-2, case.variant)
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta(), case.variant)
    assert (trained - tiny.our_logits(None, case.variant)).abs().max() > 1e-2
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory, case.variant), case.variant)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory, case.variant))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, trained, atol=5e-5, rtol=1e-5)


def test_lora_plus_steps_as_pefts_optimiser() -> None:
    ratio, examples = 8.0, tiny.batches(4)
    adapter = tiny.make("dora", r=4, target_modules="qv", loraplus_lr_ratio=ratio)
    config = {**ALL, "target_modules": ["q_proj", "v_proj"], "use_dora": True}
    model = tiny.with_peft(peft.LoraConfig(task_type="CAUSAL_LM", **config))
    tiny.share(adapter, model)
    optimiser = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio
    )
    losses = tiny.our_losses(adapter, examples, 1e-2)
    expected = tiny.their_losses(model, examples, optimiser=optimiser)
    assert losses == pytest.approx(expected, abs=1e-4)
    plain = tiny.make("dora", r=4, target_modules="qv")
    assert tiny.our_losses(plain, examples, 1e-2) != pytest.approx(expected, abs=1e-2)


def test_groups_hold_every_parameter_once() -> None:
    for method, options in (("lora", {}), ("lora", {"loraplus_lr_ratio": 4}), ("dora", {})):
        adapter = tiny.make(method, **options)
        names = [name for group in adapter.groups() for name in group.names]
        assert sorted(names) == sorted(adapter.parameters)


def test_targets_are_named_in_full_and_patterns_do_not_overlap() -> None:
    config = CASES["patterns"].make().files().config
    assert config["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in QKVO
    ]
    ranks = {f"model.layers.{layer}.self_attn.k_proj": 7 for layer in range(3)}
    assert config["rank_pattern"] == ranks | {"model.layers.1.self_attn.q_proj": 12}
    assert config["alpha_pattern"] == {
        f"model.layers.{layer}.self_attn.o_proj": 20 for layer in range(3)
    }


def test_the_same_seed_gives_the_same_start() -> None:
    one, same, other = (tiny.make("lora", seed=seed, init="random") for seed in (3, 3, 4))
    assert tiny.files_are_equal(one, same)
    assert not tiny.files_are_equal(one, other)


def test_norms_follow_optimisers_that_torch_does_not_see() -> None:
    """bitsandbytes' write to the memory itself."""
    adapter = tiny.make("dora", r=4)
    adapter.delta()
    for name, parameter in adapter.parameters.items():
        parameter.data.add_(0.1 if "lora_B" in name else 0)
    adapter.stepped(1)
    moved = tiny.make("dora", r=4)
    tiny.same_after_restoring(adapter, moved)
    for site, change in moved.delta().sites.items():
        own = adapter.delta().sites[site]
        assert torch.equal(own.gain, change.gain)
        assert not torch.equal(own.gain, torch.ones_like(own.gain))


def problems(method: str, **options: object) -> str:
    with pytest.raises(Refusal) as raised:
        tiny.make(method, **options)
    assert raised.value.reason == "METHOD_INVALID"
    return "\n".join(raised.value.messages)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    told = problems(
        "lora",
        r=0,
        lora_alpa=3,
        lora_dropout=1.0,
        target_modules=["q_proj", "query"],
        layers=[0, 3],
        rank_pattern={"gate_proj": 4, "q_proj": 1.5},
        use_rslora="maybe",
        init="piza",
    )
    for expected in (
        "r is 0; it should be at least 1",
        "there is no 'lora_alpa' (did you mean 'lora_alpha'?)",
        "lora_dropout is 1.0; it should be below 1",
        "is called 'query'; there are q_proj, k_proj",
        "there is no layer 3; the base has 0 to 2",
        "'gate_proj' names none of the target modules",
        "q_proj is 1.5; it should be a whole number",
        "use_rslora is 'maybe'; it should be true or false",
        "(did you mean 'pissa'?)",
    ):
        assert expected in told
    assert len(told.splitlines()) == 9


def test_what_the_head_cannot_have_is_told() -> None:
    told = problems("lora", target_modules="lm_head", lora_dropout=0.1, init="pissa")
    assert "lora_dropout: the head's inputs are not dropped" in told
    assert "init: the head is not quantised" in told
    for method in ("dora", "adalora", "ia3"):
        assert "is called 'lm_head'" in problems(method, target_modules=["v_proj", "lm_head"])


def test_words_for_several_modules_leave_the_head_out() -> None:
    adapter = tiny.make("lora", "llama", r=2, target_modules="all-linear")
    assert not any("lm_head" in name for name in adapter.parameters)


def test_keys_that_disagree_are_refused() -> None:
    told = problems("lora", rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 3})
    assert "both name model.layers.1.self_attn.q_proj, with different values" in told


def test_an_option_without_a_value_is_not_given() -> None:
    assert tiny.make("lora", r=None).files().config["r"] == 16


def test_unknown_methods_and_full_fine_tuning() -> None:
    assert "(did you mean 'adalora'?); there are lora, dora, adalora" in problems("adaloar")
    assert "the base, which all adapters share" in problems("full")
