"""A pass over several jobs gives each the loss and the gradient that are its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.base.weights import BaseWeights, NF4Matrix
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops.linear import ScratchLinear
from loraplex_training.data.samples import MicroBatch
from loraplex_training.step.joint import JointPass, Part
from model.changes import KINDS, random_adapter, random_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from train import plain, tiny
from train.plain import Fixed

ALL = (*KINDS, "prompt", "prefix", "base")


@cache
def base(variant: str = "llama", dtype: torch.dtype = torch.float64) -> BaseWeights:
    path = tiny.checkpoint(variant)
    return load_base(str(path), dtype, path.parent / "cache").weights


def adapter(kind: str, variant: str, seed: int) -> Fixed:
    """One of a kind on a float64 base; keys and values of a prefix are random."""
    config = base(variant).config
    if kind == "prompt":
        return Fixed(random_prompt(config, 3, seed)).to(torch.float64)
    if kind == "prefix":
        chance = torch.Generator().manual_seed(seed)
        shape = config.num_layers, 4, config.num_kv_heads, config.head_dim
        keys, values = (torch.randn(shape, generator=chance) for _ in range(2))
        return Fixed(AdapterDelta({}, VirtualTokens(None, keys, values))).to(torch.float64)
    return Fixed(random_adapter(kind, config, seed)).to(torch.float64)


def part(kind: str, variant: str, seed: int, lengths: Sequence[int] = tiny.LENGTHS) -> Part:
    batch = tiny.batch(seed, lengths)
    made = None if kind == "base" else adapter(kind, variant, seed)
    return Part(made, batch, 1 / batch.learned)


def expected(parts: Sequence[Part], variant: str = "llama") -> list[float]:
    """Leaves gradients behind, as `JointPass.backward` does."""
    sums = plain.losses(base(variant), parts)
    for s, p in zip(sums, parts, strict=True):
        if p.adapter is not None:
            (s * p.weight).backward()
    return [float(s.detach()) for s in sums]


def gradients(parts: Sequence[Part]) -> list[dict[str, torch.Tensor]]:
    return [p.adapter.gradients() if isinstance(p.adapter, Fixed) else {} for p in parts]


def compare(
    found: Sequence[dict[str, torch.Tensor]],
    wanted: Sequence[dict[str, torch.Tensor]],
    tolerance: float,
) -> int:
    """How many gradients agree; fails where one does not."""
    count = 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            if not theirs[name].any():  # rows of tokens that are not in the batch
                assert "embed_tokens" in name
                assert not gradient.any()
                continue
            assert tiny.relative(gradient, theirs[name]) < tolerance, name
            count += 1
    return count


@pytest.mark.parametrize("variant", ["llama", "qwen3-window-bias"])
def test_every_kind_of_change_at_once(variant: str) -> None:
    """All kinds side by side in float64, against the plain pass of each alone."""
    kinds = [kind for kind in ALL if kind != "whole-head"]
    parts = [part(kind, variant, seed) for seed, kind in enumerate(kinds)]
    sums = expected(parts, variant)
    wanted = gradients(parts)
    found = JointPass(base(variant)).backward(parts)
    assert found == pytest.approx(sums, rel=1e-12)
    assert compare(gradients(parts), wanted, 1e-10) > 100


@pytest.mark.parametrize("kind", ["whole-head", "everything"])
def test_a_head_of_its_own(kind: str) -> None:
    parts = [part("lora", "llama", 1), part(kind, "llama", 2), part("base", "llama", 3)]
    sums, wanted = expected(parts), gradients(parts)
    assert JointPass(base()).backward(parts) == pytest.approx(sums, rel=1e-12)
    assert compare(gradients(parts), wanted, 1e-10) > 10


def test_losses_are_those_of_the_backward_pass_without_gradients() -> None:
    parts = [part(kind, "llama", seed) for seed, kind in enumerate(("lora", "head", "prefix"))]
    joint = JointPass(base())
    assert joint.losses(parts) == pytest.approx(joint.backward(parts), rel=1e-12)
    gradients(parts)
    joint.losses(parts)
    assert gradients(parts) == [{}] * 3


def test_gradients_are_added_and_weighted() -> None:
    one = part("lora", "llama", 1)
    joint = JointPass(base())
    joint.backward([one])
    (wanted,) = gradients([one])
    joint.backward([one])
    joint.backward([Part(one.adapter, one.batch, 3 * one.weight)])
    (found,) = gradients([one])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 4 * wanted[name])


SPARING = [
    ("llama", ("lora", "norms")),  # whose last products are not computed again
    ("llama", ("lora", "gains")),
    ("llama", ("lora", "everything")),
    ("qwen3", ("lora", "everything")),
    ("cohere", ("lora", "bottlenecks")),  # MLP and attention side by side
    ("gemma2", ("lora", "base")),  # with norms of outputs
    ("mixtral", ("lora", "base")),
]


@pytest.mark.parametrize(("variant", "kinds"), SPARING)
def test_checkpointing_changes_no_bit(variant: str, kinds: Sequence[str]) -> None:
    def run(checkpointing: bool) -> list[dict[str, torch.Tensor]]:
        parts = [part(kind, variant, seed) for seed, kind in enumerate(kinds)]
        for one in parts:
            if one.adapter is not None:
                one.adapter.dropout = 0.2
        parts = [
            Part(p.adapter, p.batch, p.weight, torch.Generator().manual_seed(9)) for p in parts
        ]
        JointPass(base(variant), checkpointing=checkpointing).backward(parts)
        return gradients(parts)

    for kind, one, other in zip(kinds, run(False), run(True), strict=True):
        assert one or kind == "base"
        assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())


def test_checkpointing_computes_one_product_of_a_layer_again() -> None:
    class Counted(ScratchLinear):
        calls = 0

        def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().__call__(matrix, x)

    layers = base().config.num_layers
    for checkpointing, products in ((False, 4), (True, 5)):
        linear = Counted()
        JointPass(base(), linear, checkpointing).backward([part("lora", "llama", 1)])
        assert linear.calls == products * layers


@pytest.mark.parametrize("kind", ["lora", "everything", "prefix"])
def test_a_broken_job_moves_no_bit_of_the_others(kind: str) -> None:
    def run(broken: bool) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
        parts = [part("lora", "llama", 1), part(kind, "llama", 2), part("everything", "llama", 3)]
        if broken:
            assert parts[1].adapter is not None
            with torch.no_grad():
                for parameter in parts[1].adapter.parameters.values():
                    parameter.fill_(float("nan"))
        return JointPass(base()).backward(parts), gradients(parts)

    (right, wanted), (wrong, found) = run(False), run(True)
    assert wrong[1] != wrong[1]
    assert any(not g.isfinite().all() for g in found[1].values())
    assert (right[0], right[2]) == (wrong[0], wrong[2])
    for i in (0, 2):
        assert wanted[i]
        assert all(torch.equal(g, found[i][name]) for name, g in wanted[i].items())


def test_float32_agrees_with_float64() -> None:
    narrow = base("llama", torch.float32)
    wide = [part(kind, "llama", seed) for seed, kind in enumerate(("lora", "norms", "gains"))]
    parts = []
    for one in wide:
        assert isinstance(one.adapter, Fixed)
        parts.append(Part(one.adapter.to(torch.float32), one.batch, one.weight))
    sums = JointPass(base()).backward(wide)
    assert JointPass(narrow).backward(parts) == pytest.approx(sums, rel=1e-5)
    found = gradients(parts)
    assert all(g.dtype == torch.float32 for one in found for g in one.values())
    widened = [{n: g.double() for n, g in one.items()} for one in found]
    assert compare(widened, gradients(wide), 2e-5) > 30


def test_dropout_is_a_function_of_its_generator() -> None:
    batch = tiny.batch(1)

    def run(seed: int, beside: Sequence[Part] = ()) -> dict[str, torch.Tensor]:
        made = adapter("lora", "llama", 1)
        made.dropout = 0.3
        chance = torch.Generator().manual_seed(seed)
        own = Part(made, batch, 1 / batch.learned, chance)
        JointPass(base()).backward([*beside, own])
        return made.gradients()

    once, again, other = run(1), run(1), run(2)
    beside = run(1, [part("lora", "llama", 5)])
    for name, gradient in once.items():
        assert torch.equal(gradient, again[name])
        torch.testing.assert_close(gradient, beside[name], rtol=1e-10, atol=1e-14)
    assert any(not torch.equal(g, other[name]) for name, g in once.items())


def test_dropout_moves_on_from_pass_to_pass_and_stops_in_evaluation() -> None:
    made = adapter("lora", "llama", 1)
    made.dropout = 0.3
    chance = torch.Generator().manual_seed(1)
    own = Part(made, tiny.batch(1), 1.0, chance)
    joint = JointPass(base())
    first, second = joint.backward([own]), joint.backward([own])
    assert first != second
    before = chance.get_state()
    without = Part(made, tiny.batch(1))
    assert joint.losses([own]) == joint.losses([without])
    assert torch.equal(chance.get_state(), before)
    # the mean over masks is the loss without any, to second order
    mean = sum(joint.backward([own])[0] for _ in range(30)) / 30
    assert mean == pytest.approx(joint.losses([without])[0], rel=0.2)


class _Largest(TorchDispatchMode):
    """Sees the result of every operation."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self._vocab = vocab
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.dim() == 2 and one.shape[1] == self._vocab:
                self.rows = max(self.rows, one.shape[0])
        return out


@pytest.mark.parametrize("kind", ["lora", "head"])
def test_logits_of_all_tokens_never_exist(kind: str) -> None:
    weights = base("llama-odd-sizes")  # in which nothing else has that many columns
    made = Fixed(random_adapter(kind, weights.config, 1)).to(torch.float64)
    one = Part(made, tiny.batch(1, [200, 200, 200, 200]))
    with _Largest(len(weights.embed)) as seen:
        JointPass(weights).backward([one])
    assert 0 < seen.rows <= 512 < one.batch.learned


def test_a_part_of_which_nothing_is_learned_has_no_loss_and_no_gradient() -> None:
    silent = tiny.batch(1)
    silent = MicroBatch(silent.tokens, silent.starts, torch.full_like(silent.targets, -100))
    quiet = Part(adapter("lora", "llama", 1), silent)
    loud = part("lora", "llama", 2)
    found = JointPass(base()).backward([quiet, loud])
    assert found[0] == 0.0
    none, some = gradients([quiet, loud])
    assert all(not gradient.any() for gradient in none.values())
    assert any(gradient.any() for gradient in some.values())
