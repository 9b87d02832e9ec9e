"""FISH Mask: the entries with the most Fisher information, and no others, are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_files import llama_path
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.refusal import Refusal
from loraplex_model.ops.linear import BaseLinear
from loraplex_training.data.samples import MicroBatch
from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.step.joint import Part

from train import tiny

EXAMPLES = tiny.batches(5)
ROWS, KEEP, SAMPLES = 6, 0.2, 3


class Observed:
    """Runs the bare base over the first micro-batches, as a run does."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.calls = 0

    def __call__(self, linear: BaseLinear, batches: int, /) -> None:
        self.calls += 1
        for examples in EXAMPLES[:batches]:
            part = Part(None, examples, 1 / examples.learned)
            tiny.joint(self.variant).backward([part], linear)


def make(variant: str = "llama", seed: int = 0, **changes: object) -> TrainedAdapter:
    options: dict[str, object] = {"rows": ROWS, "keep": KEEP, "samples": SAMPLES, **changes}
    adapter = tiny.make("fishmask", variant, seed=seed, **options)
    adapter.prepare(Observed(variant))
    return adapter


def fisher(variant: str, examples: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    """The mean of squared gradients of transformers' own dense weights, by module path."""
    model: Any = tiny.model(variant)
    weights = {
        path: module.weight
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] in PROJECTIONS
    }
    found = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    for one in examples:
        model.zero_grad()
        model(**tiny.padded(one)).loss.backward()
        for path, weight in weights.items():
            found[path] += weight.grad.square() / len(examples)
    return found


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_the_entries_are_those_of_dense_autograd(variant: str) -> None:
    adapter = make(variant)
    expected = fisher(variant, EXAMPLES[:SAMPLES])
    state = adapter.state()
    assert len(expected) == 21
    for path, information in expected.items():
        rows = information.sum(1).topk(ROWS).indices.sort().values
        assert torch.equal(state[f"rows.{path}"], rows), path
        chosen = information[rows]
        count = round(KEEP * chosen.numel())
        mask = state[f"mask.{path}"]
        assert int(mask.sum()) == count
        assert chosen[mask].min() > 0.999 * chosen[~mask].max()


def test_nothing_is_held_but_two_looks_at_the_samples() -> None:
    observed = Observed("llama")
    adapter = tiny.make("fishmask", rows=ROWS)
    adapter.prepare(observed)
    assert observed.calls == 2
    assert all(p.grad is None for p in adapter.parameters.values())


def test_only_masked_entries_move() -> None:
    adapter = make()
    with torch.no_grad():
        assert torch.equal(tiny.our_logits(adapter.delta()), tiny.our_logits(None))
    losses = tiny.our_losses(adapter, EXAMPLES[:1] * 6, 1e-2)
    assert losses[-1] < 0.9 * losses[0]
    state, tensors = adapter.state(), adapter.files().tensors
    for name, values in adapter.parameters.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        mask, rows = state[f"mask.{path}"], state[f"rows.{path}"]
        assert values[mask].ne(0).all()
        assert not values[~mask].any()
        delta = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        assert torch.equal(delta[rows], values.detach())
        assert delta.count_nonzero() == mask.sum()


def test_gradients_are_those_of_the_dense_weights_entries() -> None:
    adapter = make()
    tiny.our_loss(adapter, EXAMPLES[4])
    model = tiny.model()
    model(**tiny.padded(EXAMPLES[4])).loss.backward()
    state = adapter.state()
    for name, values in adapter.parameters.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        dense = model.get_submodule(path).weight.grad[state[f"rows.{path}"]]
        assert values.grad is not None
        assert tiny.relative(values.grad, dense * state[f"mask.{path}"]) < 1e-5


def test_what_is_saved_is_a_plain_lora(tmp_path: Path) -> None:
    adapter = make(target_modules="attention", layers="1,2")
    tiny.our_losses(adapter, EXAMPLES[:3], 1e-2)
    with torch.no_grad():
        trained = tiny.our_logits(adapter.delta())
    assert (trained - tiny.our_logits(None)).abs().max() > 1e-3
    directory = tiny.save(adapter, tmp_path)
    config = adapter.files().config
    assert (config["r"], config["lora_alpha"]) == (ROWS, ROWS)
    assert config["target_modules"] == [
        llama_path(layer, name) for layer in (1, 2) for name in PROJECTIONS[:4]
    ]
    served = tiny.our_logits(tiny.opened_by_us(directory))
    torch.testing.assert_close(served, trained, atol=1e-5, rtol=1e-5)
    theirs = tiny.their_logits(tiny.opened_by_peft(directory))
    torch.testing.assert_close(theirs, trained, atol=5e-5, rtol=1e-5)


def test_going_on_from_a_state_is_exact() -> None:
    adapter = make()
    other = tiny.make("fishmask", rows=ROWS, keep=KEEP)
    tiny.our_losses(adapter, EXAMPLES[:2], 1e-2)
    assert not tiny.files_are_equal(adapter, other)
    tiny.same_after_restoring(adapter, other)
    for one in (adapter, other):
        tiny.our_losses(one, EXAMPLES[2:4], 1e-2)
    assert tiny.files_are_equal(adapter, other)


def test_more_rows_than_a_module_has_are_refused() -> None:
    with pytest.raises(Refusal, match="rows is 33; it should be at most 32"):
        tiny.make("fishmask", rows=33)
    with pytest.raises(Refusal, match=r"keep is 1.5; it should be at most 1"):
        tiny.make("fishmask", keep=1.5)
