"""Products in bfloat16: what holds of losses and gradients, compared with float64 and with PEFT."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.ops import products
from loraplex_training.report.events import RunStarted
from loraplex_training.run import precision
from loraplex_training.run.run import Run
from loraplex_training.step.joint import JointPass, Part

from train import runs, tiny
from train.plain import Fixed
from train.test_joint import ALL, adapter, gradients

NARROW = torch.bfloat16


@cache
def base(variant: str, dtype: torch.dtype) -> BaseWeights:
    path = tiny.checkpoint(variant)
    return load_base(str(path), dtype, path.parent / "cache").weights


@pytest.fixture(params=["kernels", "torch"])
def _both(request: pytest.FixtureRequest) -> Any:
    """With the kernels, where the processor has the instructions, and without them."""
    if request.param == "kernels":
        if not products.available():
            pytest.skip("this processor has no instructions for bfloat16 products")
        yield
    else:
        with mock.patch.object(products, "available", return_value=False):
            yield


def part(kind: str, variant: str, seed: int, dtype: torch.dtype) -> Part:
    batch = tiny.batch(seed)
    made = None if kind == "base" else adapter(kind, variant, seed).to(dtype)
    return Part(made, batch, 1 / batch.learned)


def run(
    kinds: tuple[str, ...],
    variant: str,
    dtype: torch.dtype,
    narrow: torch.dtype | None,
    **options: Any,
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    wide = torch.float32 if dtype == NARROW else dtype
    parts = [part(kind, variant, seed, wide) for seed, kind in enumerate(kinds)]
    sums = JointPass(base(variant, dtype), products=narrow, **options).backward(parts)
    return sums, gradients(parts)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral-window"])
def test_every_kind_of_adapter(variant: str) -> None:
    """Losses within 2 %, and each adapter's gradient within 5 % of float64's norm.

    A state that is rounded to 8 bits has an error of 0.41 * 2^-8 of it in the mean square. Some
    forty follow one another in two layers and back, independent of each other: 1 %, of which a
    gradient that is a small difference of large parts takes up to five times.
    """
    exact, wanted = run(ALL, variant, torch.float64, None)
    sums, found = run(ALL, variant, NARROW, NARROW)
    assert sums == pytest.approx(exact, rel=0.02)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(g.dtype == torch.float32 for g in mine.values())
        if mine:
            error = sum(float((mine[n].double() - theirs[n]).norm() ** 2) for n in mine)
            size = sum(float(g.norm() ** 2) for g in theirs.values())
            assert error**0.5 < 0.05 * size**0.5


@pytest.mark.usefixtures("_both")
def test_jobs_do_not_change_one_another_nor_does_checkpointing() -> None:
    """The bits of a job's loss and gradient are those that it has alone."""
    kinds = ("lora", "norms", "lora", "gains")
    sums, found = run(kinds, "llama", NARROW, NARROW)
    for some in (kinds, kinds[:3]):  # without gains, last products are not computed again
        _, mine = run(some, "llama", NARROW, NARROW)
        again, sparing = run(some, "llama", NARROW, NARROW, checkpointing=True)
        assert again == sums[: len(some)]
        for one, two in zip(mine, sparing, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
    if products.available():  # torch's products depend on the number of rows
        for seed, kind in enumerate(kinds):
            own = part(kind, "llama", seed, torch.float32)
            loss = JointPass(base("llama", NARROW), products=NARROW).backward([own])
            assert loss == [sums[seed]]
            assert isinstance(own.adapter, Fixed)
            mine = own.adapter.gradients()
            assert all(torch.equal(g, found[seed][name]) for name, g in mine.items())


@pytest.mark.usefixtures("_both")
def test_gradients_are_no_further_from_the_exact_ones_than_those_of_peft() -> None:
    """Both in bfloat16 on the same weights; PEFT's model and its states are of that type."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")

    def theirs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny.with_peft(config)
        chance = torch.Generator().manual_seed(1)
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for p in factors.values():
            p.data.copy_(torch.randn(p.shape, generator=chance) / 8)
        model.to(dtype)
        for p in factors.values():
            p.data = p.data.float() if dtype == NARROW else p.data
        model(**tiny.padded(tiny.batch(3, (40, 40, 40)))).loss.backward()
        return {n: p.grad.double() for n, p in factors.items() if p.grad is not None}

    exact, rounded = theirs(torch.float64), theirs(NARROW)
    made = tiny.make("lora", r=4, lora_alpha=8, target_modules="all-linear")
    chance = torch.Generator().manual_seed(1)
    names = [n.removeprefix("base_model.model.").replace(".default", "") for n in exact]
    ours = dict(zip(exact, names, strict=True))
    values = {ours[n]: torch.randn(g.shape, generator=chance) / 8 for n, g in exact.items()}
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            parameter.copy_(values[_key(name, values)])
    batch = tiny.batch(3, (40, 40, 40))
    JointPass(base("llama", NARROW), products=NARROW).backward(
        [Part(made, batch, 1 / batch.learned)]
    )
    found = {
        _key(n, values): p.grad.double() for n, p in made.parameters.items() if p.grad is not None
    }
    size = sum(float(g.norm() ** 2) for g in exact.values())
    mine = sum(float((found[ours[n]] - g).norm() ** 2) for n, g in exact.items()) / size
    peers = sum(float((rounded[n] - g).norm() ** 2) for n, g in exact.items()) / size
    assert 0 < mine <= peers


def _key(name: str, values: dict[str, torch.Tensor]) -> str:
    (found,) = [key for key in values if key.endswith(name) or name.endswith(key)]
    return found


def test_float32_does_not_use_the_kernels() -> None:
    with mock.patch.object(products, "_library", side_effect=AssertionError):
        run(("lora",), "llama", torch.float32, None)


@pytest.mark.parametrize(
    ("options", "has", "expected"),
    [
        ({}, True, ("bfloat16", "bfloat16")),
        ({}, False, ("float32", "float32")),
        ({"dtype": "float32"}, True, ("float32", "float32")),
        ({"dtype": "bfloat16"}, True, ("bfloat16", "bfloat16")),
        ({"dtype": "bfloat16"}, False, ("bfloat16", "float32")),
        ({"dtype": "float64"}, True, ("float64", "float32")),
        ({"products": "bfloat16"}, False, ("bfloat16", "bfloat16")),
        ({"products": "float32"}, True, ("float32", "float32")),
    ],
)
def test_types_that_auto_stands_for(
    tmp_path: Path, options: dict[str, str], has: bool, expected: tuple[str, str]
) -> None:
    spec = runs.spec(tmp_path, "a", **{"dtype": "auto", "products": "auto", **options})
    with mock.patch.object(products, "available", return_value=has):
        found = precision.chosen(spec, torch.device("cpu"))
        assert (found.dtype, found.products) == expected
        assert precision.chosen(found, torch.device("cpu")) == found


def test_types_that_exclude_each_other(tmp_path: Path) -> None:
    spec = runs.spec(tmp_path, "a", products="bfloat16")
    for wrong, device in ((dataclasses.replace(spec, dtype="float64"), "cpu"), (spec, "cuda")):
        with pytest.raises(Refusal, match="leave products at auto") as refused:
            precision.chosen(wrong, torch.device(device))
        assert refused.value.reason is Reason.CONFIG_INVALID


def test_a_resumed_run_keeps_its_types(tmp_path: Path) -> None:
    """Though the machine has other instructions; and ends with the bits of a run without a stop."""
    runs.write_base(tmp_path)
    jobs = (runs.job("a", runs.write_data(tmp_path / runs.DATA)),)
    spec = runs.spec(tmp_path, "whole", *jobs, products="bfloat16", dtype="auto")
    whole = runs.parameters(runs.train(spec)["a"])
    seen = runs.Seen()
    cut = Run.start(dataclasses.replace(spec, out=tmp_path / "cut"), [seen])
    cut._observers = [seen, runs.Calling(lambda event: cut.stop() if cut.round >= 3 else None)]
    cut.train()
    with mock.patch.object(precision, "_has_kernels", return_value=False):
        resumed = Run.resume(tmp_path / "cut", [seen])
    assert (resumed.spec.dtype, resumed.spec.products) == ("bfloat16", "bfloat16")
    found = runs.parameters(resumed.train()["a"])
    assert seen.of(RunStarted)[-1].step > 0
    assert "products in bfloat16" in seen.of(RunStarted)[-1].precision
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
