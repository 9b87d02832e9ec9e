"""A run: what it checks before it writes, what it tells, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_model.base.refusal import Refusal
from loraplex_training import methods
from loraplex_training.data.samples import Sample
from loraplex_training.report.events import (
    Evaluated,
    JobEnded,
    JobStatus,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepDone,
)
from loraplex_training.run.checkpoint import CONFIG, FOLDER
from loraplex_training.run.inputs import RunInputs
from loraplex_training.run.run import Run
from loraplex_training.spec.fields import located
from loraplex_training.spec.parse import read
from loraplex_training.spec.spec import MethodSpec, RunSpec
from loraplex_training.step.joint import JointPass, Part

from train import runs

Whole = Mapping[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("run")
    runs.write_base(top)
    runs.write_data(top / runs.DATA)
    return top


def two(top: Path) -> RunSpec:
    """Two jobs of which one is shorter."""
    jobs = (
        runs.job("a", top / runs.DATA, steps=5, eval_every=2),
        runs.job("b", top / runs.DATA, steps=3, accumulation=2, seed=1),
    )
    return runs.spec(top, "out", *jobs)


@pytest.fixture
def spec(top: Path, tmp_path: Path) -> RunSpec:
    return replace(two(top), out=tmp_path / "out")


@pytest.fixture(scope="module")
def inputs(top: Path) -> RunInputs:
    return RunInputs.open(two(top))


@pytest.fixture(scope="module")
def whole(top: Path, inputs: RunInputs) -> Whole:
    """What the two jobs become when nothing comes between."""
    spec = replace(two(top), out=top / "whole")
    return {name: runs.written(o) for name, o in runs.train(spec, inputs=inputs).items()}


def refused(spec: RunSpec, reason: str, inputs: RunInputs | None = None) -> Sequence[str]:
    """Why it is; nothing was written."""
    with pytest.raises(Refusal) as caught:
        Run.start(spec, inputs=inputs)
    assert caught.value.reason == reason
    assert not spec.out.exists()
    return [located(problem) for problem in caught.value.problems]


def test_what_a_run_tells_in_order(spec: RunSpec, inputs: RunInputs) -> None:
    seen = runs.Seen()
    outcomes = runs.train(spec, seen, inputs=inputs)
    first, *_, last = seen.events
    assert isinstance(first, RunStarted)
    assert (first.jobs, first.steps, first.step) == (("a", "b"), (5, 3), 0)
    assert first.device == "cpu"
    assert first.optimisers == ("AdamW, float32, 0.0 MB",) * 2
    assert isinstance(last, RunEnded)
    assert last.tokens == sum(e.tokens for e in seen.of(StepDone))
    assert last.peak_bytes > 1 << 20
    assert [e.step for e in seen.of(StepDone, "a")] == [1, 2, 3, 4, 5]
    assert [e.step for e in seen.of(Evaluated, "a")] == [0, 2, 4, 5]
    assert [e.step for e in seen.of(Evaluated, "b")] == [0, 3]
    assert [e.step for e in seen.of(Saved)] == [0, 3, 5]
    assert {e.job: (e.state, e.step) for e in seen.of(JobEnded)} == {
        "a": (JobStatus.FINISHED, 5), "b": (JobStatus.FINISHED, 3)
    }  # fmt: skip
    for name, outcome in outcomes.items():
        best = min((e.loss, e.step) for e in seen.of(Evaluated, name) if e.step)
        assert (outcome.progress.best_loss, outcome.progress.best_step) == best


def test_the_outcome_is_the_adapter_of_the_best_evaluation(
    spec: RunSpec, inputs: RunInputs
) -> None:
    """Its loss on the examples set apart, computed anew, is the one that was told."""
    wild = replace(spec.jobs[0], optim=replace(spec.jobs[0].optim, lr=1.0, schedule="constant"))
    spec = replace(spec, jobs=(replace(wild, steps=6, eval_every=1),))
    run = Run.start(spec, inputs=inputs)
    outcome = run.train()["a"]
    (job,) = run.jobs
    total = sum(run.joint.losses([Part(outcome.adapter, batch)])[0] for batch in job.evaluation)
    learned = sum(batch.learned for batch in job.evaluation)
    assert total / learned == pytest.approx(outcome.progress.best_loss, rel=1e-6)


def test_everything_wrong_is_told_before_anything_is_written(
    spec: RunSpec, top: Path, tmp_path: Path
) -> None:
    a, b = spec.jobs
    assert len(refused(replace(spec, jobs=(replace(a, batch_size=0), b)), "CONFIG_INVALID")) == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n[]\n')
    wrong = [
        replace(job, data=replace(job.data, path=path))
        for job, path in ((a, bad), (b, tmp_path / "none.jsonl"))
    ]
    problems = refused(replace(spec, jobs=tuple(wrong)), "DATA_INVALID")
    assert sum("bad.jsonl" in p for p in problems) == 2
    assert sum("none.jsonl" in p for p in problems) == 1
    wrong = [replace(job, method=MethodSpec("lora", {"rr": 1})) for job in spec.jobs]
    problems = refused(replace(spec, jobs=tuple(wrong)), "METHOD_INVALID")
    assert [p.split(":")[0] for p in problems] == ["job 'a'", "job 'b'"]
    refused(replace(spec, model=str(tmp_path / "no-model")), "CONFIG_INVALID")
    if not torch.cuda.is_available():
        refused(replace(spec, device="cuda"), "CONFIG_INVALID")
    paged = replace(a, optim=replace(a.optim, name="paged_adamw"))
    assert "use adamw" in refused(replace(spec, jobs=(paged,)), "CONFIG_INVALID")[0]
    alone = replace(a, data=replace(a.data, eval_fraction=0.0), patience=1)
    assert "patience" in refused(replace(spec, jobs=(alone,)), "CONFIG_INVALID")[0]


def test_a_folder_that_holds_a_run_is_not_taken(spec: RunSpec, inputs: RunInputs) -> None:
    runs.train(spec, inputs=inputs)
    with pytest.raises(Refusal, match="already holds a run"):
        Run.start(spec, inputs=inputs)


def test_a_run_in_progress_has_its_folder_alone(spec: RunSpec, inputs: RunInputs) -> None:
    run = Run.start(spec, inputs=inputs)
    with pytest.raises(Refusal) as caught:
        Run.resume(spec.out, inputs=inputs)
    assert caught.value.reason == "BUSY"
    run.stop()
    run.train()
    Run.resume(spec.out, inputs=inputs)


def test_the_folder_says_what_was_asked_for(spec: RunSpec, inputs: RunInputs) -> None:
    Run.start(spec, inputs=inputs)
    assert read(config=spec.out / CONFIG) == spec


def test_without_evaluation_the_last_step_is_kept(spec: RunSpec) -> None:
    (a, _) = spec.jobs
    spec = replace(spec, jobs=(replace(a, data=replace(a.data, eval_fraction=0.0)),))
    seen = runs.Seen()
    outcome = runs.train(spec, seen)["a"]
    assert seen.of(Evaluated) == []
    assert (outcome.progress.state, outcome.progress.best_step) == (JobStatus.FINISHED, 5)
    assert outcome.progress.best_loss == seen.of(StepDone, "a")[-1].loss


def test_one_job_is_cancelled_and_the_other_goes_on(spec: RunSpec, inputs: RunInputs) -> None:
    def cancel(event: Any) -> None:
        if isinstance(event, StepDone) and (event.job, event.step) == ("a", 3):
            threading.Thread(target=run.cancel, args=("a",)).run()

    seen = runs.Seen()
    run = Run.start(spec, [seen, runs.Calling(cancel)], inputs)
    outcomes = run.train()
    assert (outcomes["a"].progress.state, outcomes["a"].progress.step) == (JobStatus.CANCELLED, 3)
    assert outcomes["a"].progress.best_step == 2, "its best so far"
    assert outcomes["b"].progress.state is JobStatus.FINISHED
    alone = runs.alone(replace(spec, out=spec.out / "b"), inputs, [spec.jobs[1]])["b"]
    for name, tensor in runs.parameters(outcomes["b"]).items():
        torch.testing.assert_close(tensor, runs.parameters(alone)[name], rtol=1e-4, atol=1e-5)
    again = Run.resume(spec.out, inputs=inputs).train()
    assert again["a"].progress.state is JobStatus.CANCELLED, "which is on the disk too"
    with pytest.raises(Refusal, match="no job 'c'"):
        run.cancel("c")


def test_cancelling_the_last_job_is_saved_too(spec: RunSpec, inputs: RunInputs) -> None:
    def cancel(event: Any) -> None:
        if isinstance(event, Saved) and event.step == 3:
            run.cancel("a")

    seen = runs.Seen()
    run = Run.start(replace(spec, jobs=spec.jobs[:1]), [seen, runs.Calling(cancel)], inputs)
    outcome = run.train()["a"]
    assert (outcome.progress.state, outcome.progress.step, run.round) == (JobStatus.CANCELLED, 3, 3)
    assert [e.step for e in seen.of(Saved)] == [0, 3, 3]
    again = Run.resume(spec.out, inputs=inputs).train()["a"]
    assert again.progress == outcome.progress


@pytest.mark.parametrize("at", [0, 2])
def test_stop_saves_and_returns_and_the_rest_is_as_if_nothing_had_been(
    spec: RunSpec, inputs: RunInputs, whole: Whole, at: int
) -> None:
    def stop(event: Any) -> None:
        if at == 0 or (isinstance(event, StepDone) and event.step == at):
            run.stop()

    run = Run.start(spec, [runs.Calling(stop)], inputs)
    outcomes = run.train()
    assert {o.progress.state for o in outcomes.values()} == {JobStatus.TRAINING}
    assert {o.progress.step for o in outcomes.values()} == {at}
    found = Run.resume(spec.out, inputs=inputs).train()
    assert {n: runs.written(o) for n, o in found.items()} == whole


def test_a_step_that_was_begun_when_it_stopped_leaves_nothing_behind(
    spec: RunSpec, inputs: RunInputs, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(spec, inputs=inputs)
    passes = 0
    backward = JointPass.backward

    def counted(self: JointPass, parts: Sequence[Part], *rest: Any) -> list[float]:
        nonlocal passes
        passes += 1
        if passes == 3:  # the first micro-batch of two, in the second step
            run.stop()
        return backward(self, parts, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(JointPass, "backward", counted)
        outcomes = run.train()
    assert {o.progress.step for o in outcomes.values()} == {1}
    for outcome in outcomes.values():
        assert all(p.grad is None for p in outcome.adapter.parameters.values())
    found = Run.resume(spec.out, inputs=inputs).train()
    assert runs.written(found["b"]) == whole["b"]


def test_the_end_of_memory_is_an_error_that_says_what_to_lower(
    spec: RunSpec, inputs: RunInputs, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(spec, inputs=inputs)
    passes = 0
    backward = JointPass.backward

    def greedy(self: JointPass, parts: Sequence[Part], *rest: Any) -> list[float]:
        nonlocal passes
        passes += 1
        if passes == 8:  # in step 4; step 3 was saved
            torch.empty(1 << 60, dtype=torch.uint8)
        return backward(self, parts, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(JointPass, "backward", greedy)
        with pytest.raises(Refusal) as caught:
            run.train()
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert str(1 << 60) in str(caught.value), "how much was asked for"
    assert "batch_size=2" in str(caught.value)
    found = Run.resume(spec.out, inputs=inputs).train()
    assert runs.written(found["a"]) == whole["a"]


def test_an_error_that_is_not_memory_stays_what_it_is(
    spec: RunSpec, inputs: RunInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> list[float]:
        raise RuntimeError("a bug")

    run = Run.start(spec, inputs=inputs)
    monkeypatch.setattr(JointPass, "backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run.train()


def test_answers_make_the_metric_and_samples(spec: RunSpec, inputs: RunInputs) -> None:
    asked: list[tuple[bool, int]] = []

    def answer(delta: Any, samples: Sequence[Sample]) -> list[str]:
        """Right where there is an adapter, for the first three examples."""
        asked.append((delta is None, len(samples)))
        right = [s.reference for s in samples]
        return ["?" if delta is None or i >= 3 else r for i, r in enumerate(right)]

    a, b = (replace(job, metric="exact", metric_examples=4) for job in spec.jobs)
    seen = runs.Seen()
    run = Run.start(replace(spec, jobs=(a, b)), [seen], inputs)
    outcomes = run.train(answer)
    assert [(e.step, e.metric) for e in seen.of(Evaluated, "a")] == [
        (0, 0.0), (2, 0.75), (4, 0.75), (5, 0.75)
    ]  # fmt: skip
    progress = outcomes["a"].progress
    assert (progress.first_metric, progress.best_metric) == (0.0, 0.75)
    samples = seen.of(Sampled, "a")
    examples = inputs.datasets["a"].evaluation
    assert [s.step for s in samples] == [0] * 3 + [5] * 3
    assert [s.reference for s in samples] == [e.reference for e in examples[:3]] * 2
    assert [s.answer for s in samples[:3]] == ["?"] * 3
    assert [s.answer for s in samples[3:]] == [s.reference for s in samples[3:]]
    assert all(s.prompt.endswith(">") for s in samples)
    assert sum(base for base, _ in asked) == 2, "the base is asked once for the jobs that share"


def test_masks_are_chosen_from_the_jobs_own_data_over_the_bare_base(
    spec: RunSpec, inputs: RunInputs
) -> None:
    options = {"target_modules": "q_proj", "rows": 2, "samples": 3}
    fish = replace(spec.jobs[0], method=MethodSpec("fishmask", options), steps=2)
    one = replace(spec, jobs=(fish,))
    seen: list[int] = []
    backward = JointPass.backward

    class Counted(JointPass):
        def backward(self, parts: Sequence[Part], linear: Any = None) -> list[float]:
            if linear is not None:
                assert [part.adapter for part in parts] == [None]
                seen.append(int(parts[0].batch.tokens.sum()))
            return backward(self, parts, linear)

    run = Run.start(one, inputs=inputs)
    run.joint = Counted(inputs.base.weights)
    outcome = run.train()["a"]
    batches = [run.jobs[0].batches.step(i)[0] for i in (0, 1)]
    # a job of two steps has two micro-batches, fewer than were asked for
    assert seen == [int(batch.tokens.sum()) for batch in batches] * 2
    state = outcome.adapter.state()
    assert any(int(mask.sum()) for name, mask in state.items() if "mask" in name)


def test_every_method_trains_in_one_run(spec: RunSpec, inputs: RunInputs, top: Path) -> None:
    jobs = tuple(
        replace(
            runs.job(name.replace("_", "-"), top / runs.DATA, steps=2, data=vars_of(spec)),
            method=MethodSpec(name, {}),
        )
        for name in methods.METHODS
    )
    datasets = {job.name: inputs.datasets["a"] for job in jobs}
    every = RunInputs(inputs.base, inputs.text, datasets)
    outcomes = runs.train(replace(spec, jobs=jobs), inputs=every)
    assert len(outcomes) == len(methods.METHODS)
    assert {o.progress.state for o in outcomes.values()} == {JobStatus.FINISHED}
    assert (spec.out / FOLDER / "000002").is_dir()
    found = Run.resume(spec.out, inputs=every).train()
    for name, outcome in outcomes.items():
        assert runs.written(found[name]) == runs.written(outcome)


def vars_of(spec: RunSpec) -> dict[str, Any]:
    data = spec.jobs[0].data
    return {"eval_fraction": data.eval_fraction, "max_length": data.max_length}
