"""What A and B start from: PEFT's distributions, its PiSSA and its LoftQ; saved as plain LoRA."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.adapter_files import llama_path
from loraplex_model.base.config import PROJECTIONS, Site
from loraplex_model.base.refusal import Refusal
from loraplex_training.methods.targets import weight
from peft.utils.loftq_utils import _low_rank_decomposition

from train import tiny

SITES: list[Site] = [(layer, name) for layer in range(3) for name in PROJECTIONS]


def factors(adapter: Any, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    path = f"base_model.model.{llama_path(*site)}"
    a, b = (adapter.parameters[f"{path}.lora_{letter}.weight"] for letter in "AB")
    return a.detach(), b.detach()


@pytest.mark.parametrize(("init", "theirs"), [("default", True), ("random", False)])
def test_uniform_starts_are_spread_as_pefts(init: str, theirs: bool) -> None:
    adapter = tiny.make("lora", init=init, r=8)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=8, target_modules="all-linear", init_lora_weights=theirs, task_type="CAUSAL_LM"
    )
    for name, wanted in tiny.their_parameters(tiny.with_peft(config)).items():
        found, wanted = adapter.parameters[name].detach(), wanted.detach()
        if not wanted.any():
            assert not found.any()
            continue
        bound = 1 / math.sqrt(found.shape[1])
        for drawn in (found, wanted):
            assert 0.95 * bound < drawn.abs().max() <= bound
            assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_gaussian_starts_have_a_std_of_one_over_r() -> None:
    adapter = tiny.make("lora", init="gaussian", r=8)
    drawn = torch.cat([factors(adapter, site)[0].flatten() for site in SITES])
    assert drawn.std() == pytest.approx(1 / 8, rel=0.03)
    assert drawn.abs().max() > 3 / 8
    assert not any(factors(adapter, site)[1].any() for site in SITES)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_trains_as_pefts_and_is_saved_as_plain_lora(use_rslora: bool, tmp_path: Path) -> None:
    """PEFT takes the principal parts out of its base; ours stays whole."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": use_rslora}
    exact: dict[str, Any] = {"init": "pissa", "svd_iterations": 0, **options}
    adapter = tiny.make("lora", target_modules="attention", **exact)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(
        target_modules=names, init_lora_weights="pissa", task_type="CAUSAL_LM", **options
    )
    model = tiny.with_peft(config)
    for name, parameter in tiny.their_parameters(model).items():
        torch.testing.assert_close(adapter.parameters[name], parameter)

    with torch.no_grad():
        start = tiny.our_logits(adapter.delta())
    torch.testing.assert_close(start, tiny.our_logits(None), atol=1e-5, rtol=1e-5)
    examples = tiny.batches(4)
    losses = tiny.our_losses(adapter, examples, 1e-2)
    assert losses == pytest.approx(tiny.their_losses(model, examples, 1e-2), abs=1e-4)

    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta())
    assert (trained - start).abs().max() > 1e-2
    directory = tiny.save(adapter, tmp_path)
    assert adapter.files().config["r"] == 8
    assert adapter.files().config["init_lora_weights"] is True
    served = tiny.our_logits(tiny.opened_by_us(directory))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory))
    torch.testing.assert_close(theirs, trained, atol=5e-5, rtol=1e-5)


def test_pissa_goes_on_from_the_start_that_it_had(tmp_path: Path) -> None:
    adapter = tiny.make("lora", init="pissa", svd_iterations=2, target_modules="qv", seed=1)
    other = tiny.make("lora", init="pissa", svd_iterations=2, target_modules="qv", seed=2)
    tiny.our_losses(adapter, tiny.batches(2))
    assert not tiny.files_are_equal(adapter, other)
    tiny.same_after_restoring(adapter, other)
    assert tiny.files_are_equal(adapter, other)


def test_iterations_find_nearly_the_best_fit() -> None:
    best, near, poor = (
        tiny.make("lora", init="pissa", r=8, svd_iterations=n, target_modules="mlp")
        for n in (0, 8, 1)
    )
    sites = [site for site in SITES if site[1] in ("gate_proj", "up_proj", "down_proj")]
    errors = []
    for adapter in (best, near, poor):
        error = 0.0
        for site in sites:
            a, b = factors(adapter, site)
            error += float((weight(tiny.base(), site) - 2 * b @ a).norm())
        errors.append(error)
    assert errors[0] <= errors[1] < 1.002 * errors[0]
    assert errors[1] < errors[2]


def test_loftq_starts_as_pefts_fit_of_what_quantisation_took() -> None:
    source = str(tiny.checkpoint("llama"))
    options: dict[str, Any] = {"init": "loftq", "loftq_source": source, "svd_iterations": 0}
    adapter = tiny.make("lora", r=8, lora_alpha=16, **options)
    original = tiny.tiny.build("llama")
    for site in SITES:
        full = original.get_submodule(llama_path(*site)).weight.detach()
        residual = full - weight(tiny.base(), site)
        fit = _low_rank_decomposition(residual, reduced_rank=8)
        a, b = factors(adapter, site)
        torch.testing.assert_close(2.0 * b @ a, fit["L"] @ fit["R"], atol=1e-5, rtol=1e-4)
        assert (residual - 2.0 * b @ a).norm() < 0.9 * residual.norm()
    assert adapter.files().config["init_lora_weights"] is True
    assert adapter.files().config["r"] == 8


def test_dora_keeps_the_length_of_what_it_starts_from() -> None:
    """As PEFT: magnitudes are those of W + s B A, whatever A and B start from."""
    adapter = tiny.make("dora", init="random", r=4, target_modules="qv")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = tiny.with_peft(config)
    tiny.share(adapter, model)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_magnitude_vector["default"].update_layer(
                base_layer=module.base_layer,
                lora_A=module.lora_A["default"].weight,
                lora_B=module.lora_B["default"].weight,
                scaling=module.scaling["default"],
            )
    for name, wanted in tiny.their_parameters(model).items():
        torch.testing.assert_close(adapter.parameters[name], wanted)


def test_a_pissa_dora_is_saved_as_plain_dora(tmp_path: Path) -> None:
    adapter = tiny.make("dora", init="pissa", r=4, target_modules="attention")
    tiny.our_losses(adapter, tiny.batches(3), 1e-2)
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta())
    directory = tiny.save(adapter, tmp_path)
    served = tiny.our_logits(tiny.opened_by_us(directory))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory))
    torch.testing.assert_close(theirs, trained, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"init": "loftq"}, "give the directory (or .gguf file) of the weights before"),
        ({"init": "loftq", "loftq_source": "/nowhere"}, "there is no /nowhere"),
        ({"loftq_source": "/nowhere"}, "means something with init=loftq only, not 'default'"),
        ({"svd_iterations": 2}, "nothing is decomposed where init is 'default'"),
        ({"init": "pissa", "r": 33}, "k_proj has only 32 singular values, not 33"),
        ({"init": "pissa", "r": 129}, "r is 129; it should be at most 128"),
        ({"r": 257}, "r is 257; it should be at most 256"),
    ],
)
def test_starts_that_cannot_be(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(Refusal) as raised:
        tiny.make("lora", **options)
    assert raised.value.reason == "METHOD_INVALID"
    assert expected in "\n".join(raised.value.messages)


def test_loftq_of_other_weights_is_refused(tmp_path: Path) -> None:
    tiny.tiny.write("llama", tmp_path / "other", seed=5)
    with pytest.raises(Refusal, match="not the checkpoint that this base was quantised from"):
        tiny.make("lora", init="loftq", loftq_source=str(tmp_path / "other"))
    with pytest.raises(Refusal, match="not the checkpoint that this base was quantised from"):
        tiny.make("lora", init="loftq", loftq_source=str(tiny.checkpoint("qwen2")))
