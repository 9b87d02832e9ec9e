"""What the papers of the methods say of their start and their size, of every method there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.weights import BaseWeights
from loraplex_model.ops.linear import BaseLinear
from loraplex_training import methods
from loraplex_training.methods.base import Setting, TrainedAdapter
from loraplex_training.spec.spec import MethodSpec
from loraplex_training.step.joint import JointPass, Part

from train import tiny

VIRTUAL = {"prompt_tuning", "p_tuning", "prefix_tuning"}
"""Their tokens stand before the prompt from the first step on."""


def untrained(method: str) -> TrainedAdapter:
    """As it is before its first step, on a base with biases (BitFit needs some)."""
    adapter = tiny.make(method, "qwen2")
    joint = JointPass(tiny.base("qwen2"))

    def observe(linear: BaseLinear, batches: int) -> None:
        for examples in tiny.batches(batches):
            joint.backward([Part(None, examples)], linear)

    adapter.prepare(observe)
    return adapter


@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - VIRTUAL))
def test_an_untrained_adapter_is_the_base_bit_for_bit(method: str) -> None:
    """LoRA's section 4.1 (B = 0), DoRA's (m = |W|), IA3's ones, BitFit's and bottlenecks' zeros."""
    ours = tiny.our_logits(untrained(method).delta(), "qwen2")
    assert torch.equal(ours, tiny.our_logits(None, "qwen2"))


@pytest.mark.parametrize("method", sorted(VIRTUAL))
def test_virtual_tokens_are_all_that_a_prompt_method_changes(method: str) -> None:
    """Keys and values, or embeddings: no projection, so no query either (Prefix-Tuning)."""
    delta = untrained(method).delta()
    assert not delta.sites
    assert delta.virtual is not None
    assert (delta.virtual.keys is not None) == (method == "prefix_tuning")
    assert (delta.virtual.embeddings is None) == (method == "prefix_tuning")


@pytest.mark.parametrize("rank", [1, 6])
def test_lora_has_r_times_d_plus_k_parameters(rank: int) -> None:
    adapter = tiny.make("lora", r=rank)
    config = tiny.base().config
    shapes = config.projection_shapes()
    wanted = config.num_layers * sum(rank * sum(shapes[name]) for name in PROJECTIONS)
    assert sum(p.numel() for p in adapter.parameters.values()) == wanted
    assert sum(t.numel() for t in adapter.files().tensors.values()) == wanted


def test_rank_6_is_120_thousand_parameters_of_a_hundred_million() -> None:
    """The example that notes on LoRA give, with the count of the whole matrix put right."""
    config = replace(
        tiny.base().config, hidden_size=10_000, num_heads=100, head_dim=100, num_layers=1
    )
    fan_in, fan_out = config.projection_shapes()["o_proj"]
    assert fan_in * fan_out == 100_000_000
    base = BaseWeights(config, torch.empty(0), (), torch.empty(0), torch.empty(0), "", ())
    setting = Setting(base, "none", torch.Generator(), 1, lambda text: [])
    options = {"r": 6, "target_modules": "o_proj"}
    adapter = methods.make(MethodSpec("lora", options), setting)
    assert sum(p.numel() for p in adapter.parameters.values()) == 120_000
