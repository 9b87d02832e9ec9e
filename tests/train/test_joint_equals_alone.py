"""A job becomes what it would become alone, whoever trains beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex_training.report.events import JobStatus, StepDone
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from loraplex_training.spec.spec import JobSpec, MethodSpec, RunSpec
from loraplex_training.step.joint import Part

from train import runs

WIDE = {"r": 8, "target_modules": "all-linear", "lora_alpha": 4}


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("joint")
    runs.write_base(top)
    runs.write_data(top / "short.jsonl", 16, seed=1)
    runs.write_data(top / "long.jsonl", 20, seed=2)
    return top


def five(top: Path) -> list[JobSpec]:
    """Different ranks, targets, data, batches, optimisers; one short, one that stops, one wild."""
    short, long = top / "short.jsonl", top / "long.jsonl"
    return [
        runs.job("plain", short),
        runs.job("wide", long, options=WIDE, batch_size=3, accumulation=2, seed=4),
        runs.job("early", long, steps=4, options={"r": 1, "target_modules": "down_proj"}),
        runs.job("wild", short, options=WIDE, optim={"lr": 1e200}, eval_every=2),
        replace(
            runs.job("gain", short, optim={"name": "sgd", "lr": 0.1}), method=MethodSpec("ia3")
        ),
    ]


@pytest.fixture(scope="module")
def exact(top: Path) -> tuple[RunSpec, RunInputs]:
    """The jobs on a base that computes in float64."""
    jobs = tuple(five(top))
    spec = runs.spec(top, "exact", *jobs, dtype="float64", save_every=1000)
    return spec, RunInputs.open(spec)


def test_final_weights_are_those_of_each_alone(exact: tuple[RunSpec, RunInputs]) -> None:
    spec, inputs = exact
    assert inputs.base.weights.embed.dtype == torch.float64
    seen = runs.Seen()
    joint = runs.train(spec, seen, inputs=inputs)
    alone = runs.alone(spec, inputs, spec.jobs)
    states = {name: outcome.progress.state for name, outcome in joint.items()}
    assert states.pop("wild") is JobStatus.DIVERGED
    assert set(states.values()) == {JobStatus.FINISHED}
    assert [outcome.progress.step for outcome in joint.values()][:3] == [10, 10, 4]
    assert joint["wild"].progress.step < 10
    for name, outcome in joint.items():
        assert (outcome.progress.state, outcome.progress.step) == (
            alone[name].progress.state,
            alone[name].progress.step,
        )
        assert outcome.progress.best_step == alone[name].progress.best_step
        mine, other = runs.parameters(outcome), runs.parameters(alone[name])
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-9)
    started = {job.name: job.adapter.parameters for job in inputs.jobs(spec)}
    for name in states:
        after = runs.parameters(joint[name])
        moved = [(after[k] - p.detach()).abs().max() for k, p in started[name].items()]
        assert max(moved) > 1e-3, "what was compared is more than where they began"
        assert len(seen.of(StepDone, name)) == joint[name].progress.step


def test_in_float32_on_nf4_gradients_at_equal_weights_agree(top: Path) -> None:
    jobs = tuple(job for job in five(top) if job.name != "wild")
    spec = runs.spec(top, "float32", *jobs)
    run = Run.start(spec)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for job in run.jobs:
            for parameter in job.adapter.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=chance))
    parts = [job.begin().parts[0] for job in run.jobs]
    together = gradients(run, parts)
    apart = [gradients(run, [part])[0] for part in parts]
    for mine, other in zip(together, apart, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert float(two.norm()) > 0
            assert float((one - two).norm() / two.norm()) < 1e-5


def gradients(run: Run, parts: list[Part]) -> list[list[torch.Tensor]]:
    run.joint.backward(parts)
    found = []
    for part in parts:
        assert part.adapter is not None
        own = part.adapter.parameters.values()
        found.append([p.grad.clone() for p in own if p.grad is not None])
        for p in own:
            p.grad = None
    return found


def test_eight_at_once_are_two_times_four_with_ragged_lengths(
    exact: tuple[RunSpec, RunInputs], top: Path
) -> None:
    """As in transformers issue 34191: a token weighs the same wherever its micro-batch ends."""
    jobs = [
        runs.job(name, top / "long.jsonl", batch_size=size, accumulation=times, options=WIDE)
        for name, size, times in (("once", 8, 1), ("twice", 4, 2), ("single", 1, 8))
    ]
    spec = runs.spec(top, "accumulated", *jobs, dtype="float64")
    spec = replace(spec, jobs=tuple(replace(job, steps=5) for job in spec.jobs))
    run = Run.start(replace(spec, out=top / "ragged"))
    micro = [part.batch.learned for part in run.jobs[1].begin().parts]
    assert len(set(micro)) == 2, "the micro-batches learn different numbers of tokens"
    seen = runs.Seen()
    found = {n: runs.parameters(o) for n, o in runs.train(spec, seen).items()}
    losses = {job.name: [e.loss for e in seen.of(StepDone, job.name)] for job in jobs}
    for name in ("twice", "single"):
        assert losses[name] == pytest.approx(losses["once"], abs=1e-9)
        for key, tensor in found[name].items():
            torch.testing.assert_close(tensor, found["once"][key], rtol=0, atol=1e-9)
