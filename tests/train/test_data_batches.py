"""What a step learns is a function of examples, job and step, and nothing is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_training.data import Batches, in_order
from loraplex_training.data.samples import MicroBatch, Sample
from loraplex_training.spec.spec import DataSpec, JobSpec


def made(lengths: list[int]) -> list[Sample]:
    """Samples that are told apart by their first token."""
    return [
        Sample((i, *range(1, n)), (False, *[k % 3 > 0 for k in range(1, n)]), 1, "", i + 1)
        for i, n in enumerate(lengths)
    ]


def job(**changes: Any) -> JobSpec:
    return replace(JobSpec("a", DataSpec(Path("x"))), **changes)


def whose(batch: MicroBatch) -> list[int]:
    return [int(batch.tokens[start]) for start in batch.starts[:-1]]


def same(a: list[MicroBatch], b: list[MicroBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.targets, y.targets)
        and x.starts == y.starts
        for x, y in zip(a, b, strict=True)
    )


lengths = st.lists(st.integers(2, 40), min_size=1, max_size=60)
jobs = st.builds(
    job,
    batch_size=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    pack=st.booleans(),
    max_tokens=st.just(64),
    epochs=st.sampled_from([0.3, 1.0, 2.0, 2.5]),
    seed=st.integers(0, 3),
)


@settings(deadline=None, max_examples=60)
@given(lengths, jobs)
def test_an_epoch_takes_every_example_once_and_no_batch_is_too_large(
    sizes: list[int], spec: JobSpec
) -> None:
    samples = made(sizes)
    batches = Batches(samples, spec)
    epochs: dict[int, list[list[MicroBatch]]] = {}
    for i in range(batches.steps):
        step = batches.step(i)
        epochs.setdefault(batches.epoch(i), []).append(step)
        assert 1 <= len(step) <= spec.accumulation
        for batch in step:
            assert len(batch.tokens) == batch.starts[-1]  # no padding
            assert len(batch.tokens) <= 64 if spec.pack else len(whose(batch)) <= spec.batch_size
    assert list(epochs) == list(range(ceil(spec.epochs)))
    for epoch, steps in epochs.items():
        taken = Counter(index for step in steps for batch in step for index in whose(batch))
        assert max(taken.values()) == 1
        if epoch < int(spec.epochs):
            assert len(taken) == len(samples)
            assert all(len(step) == spec.accumulation for step in steps[:-1])


@settings(deadline=None, max_examples=30)
@given(lengths, jobs, st.randoms(use_true_random=False))
def test_a_step_does_not_depend_on_the_steps_before_it(
    sizes: list[int], spec: JobSpec, random: Any
) -> None:
    samples = made(sizes)
    batches = Batches(samples, spec)
    order = random.sample(range(batches.steps), batches.steps)
    for i in order[:10]:
        assert same(Batches(samples, spec).step(i), batches.step(i))


def test_epochs_and_seeds_have_their_own_order() -> None:
    samples = made([5] * 40)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = Batches(samples, job(batch_size=40, epochs=2, seed=seed))
        return tuple(whose(batches.step(epoch)[0]))

    assert len({order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4
    # a fixed case: another machine, another version of Python
    assert order(0, 0)[:6] == (8, 36, 39, 13, 20, 9)


def test_steps_of_eight_ones_and_of_two_fours_hold_the_same_examples() -> None:
    samples = made([3 + i % 7 for i in range(30)])
    one = Batches(samples, job(batch_size=8))
    two = Batches(samples, job(batch_size=4, accumulation=2))
    eight = Batches(samples, job(batch_size=1, accumulation=8))
    assert one.steps == two.steps == eight.steps == 12
    for i in range(one.steps):
        taken = [[s for b in batches.step(i) for s in whose(b)] for batches in (one, two, eight)]
        assert taken[0] == taken[1] == taken[2]
        assert sum(b.learned for b in one.step(i)) == sum(b.learned for b in two.step(i))


def test_first_fit_leaves_no_batch_that_a_later_example_would_have_fitted_into() -> None:
    samples = made([30, 40, 20, 24, 10, 34, 60, 4, 54, 2] * 5)
    [step] = [Batches(samples, job(pack=True, max_tokens=64, epochs=1, accumulation=99)).step(0)]
    sizes = [len(sample.tokens) for sample in samples]
    order = [whose(batch) for batch in step]
    for at, batch in enumerate(order):
        room = 64 - sum(sizes[s] for s in batch)
        assert all(sizes[sample] > room for later in order[at + 1 :] for sample in later)
    assert len(order) <= 26  # 1,390 tokens; at least 22


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 4), (0.5, 2), (0.01, 1), (1.5, 6), (3.0, 12), (2.3, 10)]
)
def test_parts_of_epochs_are_rounded_up_to_steps(epochs: float, steps: int) -> None:
    batches = Batches(made([4] * 16), job(batch_size=4, epochs=epochs))
    assert batches.steps == steps
    with pytest.raises(IndexError):
        batches.step(steps)


@pytest.mark.parametrize("pack", [False, True])
def test_a_number_of_steps_overrules_epochs(pack: bool) -> None:
    batches = Batches(made([4] * 10), job(batch_size=4, steps=7, pack=pack, max_tokens=16))
    assert batches.steps == 7
    assert [batches.epoch(i) for i in range(7)] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("pack", [False, True])
def test_evaluation_takes_every_example_in_order(pack: bool) -> None:
    samples = made([5, 9, 3, 12, 7])
    batches = in_order(samples, job(batch_size=2, pack=pack, max_tokens=15))
    assert [whose(b) for b in batches] == ([[0, 1], [2, 3], [4]])
    assert in_order([], job()) == []


def test_wrong_options_are_told_at_once() -> None:
    with pytest.raises(Refusal) as caught:
        Batches([], job(epochs=0.0, batch_size=0, accumulation=0))
    assert caught.value.reason == "CONFIG_INVALID"
    assert len(caught.value.messages) == 4
    with pytest.raises(Refusal, match="the longest example has 9 tokens"):
        Batches(made([9]), job(pack=True, max_tokens=8))
    for epochs in (float("nan"), float("inf"), -1.0):
        with pytest.raises(Refusal, match="epochs"):
            Batches(made([9]), job(epochs=epochs))
