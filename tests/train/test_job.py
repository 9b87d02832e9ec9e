"""One job: the order of a step, how it ends, and that the best of it is what is left."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex_training.data import Batches, in_order
from loraplex_training.data.samples import Sample
from loraplex_training.methods.base import ParameterGroup
from loraplex_training.report.events import Evaluated, Event, JobEnded, JobStatus, StepDone
from loraplex_training.spec.spec import DataSpec, JobSpec, OptimSpec
from loraplex_training.step.divergence import STEPS
from loraplex_training.step.job import Job


class Counting:
    """An adapter of one number, whose gradient a test chooses; notes what it is told, and when."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.parameters: Mapping[str, torch.Tensor] = {"x": torch.zeros(2, requires_grad=True)}
        self.dropout = dropout
        self.settled = 0
        self.seen = torch.zeros(1)
        self.told: list[tuple[str, list[float], list[float] | None]] = []

    def prepare(self, observe: Any) -> None: ...

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup(("x",))]

    def delta(self) -> Any: ...

    def penalty(self) -> torch.Tensor:
        self._note("penalty")
        return 10 * self.parameters["x"].sum()

    def stepped(self, step: int) -> None:
        self._note(f"stepped {step}")
        self.seen += 1

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"seen": self.seen}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.seen.copy_(state["seen"])

    def files(self) -> Any: ...

    def _note(self, what: str) -> None:
        x = self.parameters["x"]
        self.told.append((what, x.tolist(), None if x.grad is None else x.grad.tolist()))


def samples(count: int) -> list[Sample]:
    """Of 3 to 6 tokens, of which the first is not learned."""
    lengths = [3 + i % 4 for i in range(count)]
    return [
        Sample(tuple(range(1, n + 1)), (False, *[True] * (n - 1)), 1, "", i + 1)
        for i, n in enumerate(lengths)
    ]


def make(adapter: Counting | None = None, evaluation: int = 3, **changes: Any) -> Job:
    optim = OptimSpec(
        "sgd", **{"lr": 0.5, "schedule": "constant", "warmup": 0.0, "clip": 0.0}
        | changes.pop("optim", {})
    )  # fmt: skip
    options = {"steps": 8, "batch_size": 2, "eval_every": 1} | changes
    spec = JobSpec("a", DataSpec(Path("d")), optim=optim, **options)
    batches = Batches(samples(10), spec)
    apart = in_order(samples(evaluation), spec)
    return Job(spec, adapter or Counting(), batches, apart, torch.Generator().manual_seed(0))


def take(job: Job, mean: float = 1.0, gradient: Sequence[float] = (1.0, 1.0)) -> list[Event]:
    """One step with this mean loss and this gradient of it."""
    step = job.begin()
    job.adapter.parameters["x"].grad = torch.tensor(gradient, dtype=torch.float32)
    return list(job.end(step, mean * step.learned, 0.1))


def assess(job: Job, mean: float, metric: float | None = None) -> list[Event]:
    learned = sum(batch.learned for batch in job.evaluation)
    return list(job.evaluate(mean * learned, metric))


def ended(events: Iterable[Event]) -> JobEnded | None:
    return next((event for event in events if isinstance(event, JobEnded)), None)


def test_the_order_of_a_step() -> None:
    adapter = Counting()
    job = make(adapter, optim={"clip": 1.0})
    (event,) = take(job, 2.0, (3.0, 4.0))
    norm = math.hypot(13, 14)
    penalised, stepped = adapter.told
    assert penalised == ("penalty", [0.0, 0.0], [3.0, 4.0]), "before it moves, beside the loss's"
    what, moved, gradient = stepped
    assert what == "stepped 1"
    assert gradient == pytest.approx([13 / norm, 14 / norm]), "clipped, and still there"
    assert moved == pytest.approx([-0.5 * 13 / norm, -0.5 * 14 / norm]), "after the optimiser"
    assert adapter.parameters["x"].grad is None, "gone in the end"
    assert isinstance(event, StepDone)
    assert (event.step, event.loss, event.rate) == (1, pytest.approx(2.0), 0.5)
    assert event.norm == pytest.approx(norm), "before clipping"


def test_every_learned_token_of_a_step_weighs_alike() -> None:
    job = make(accumulation=3)
    step = job.begin()
    assert len(step.parts) == 3
    assert {part.weight for part in step.parts} == {1 / step.learned}
    assert step.learned == sum(part.batch.learned for part in step.parts)
    assert step.tokens == sum(len(part.batch.tokens) for part in step.parts) > step.learned


def test_the_loss_of_a_step_is_the_mean_over_its_learned_tokens() -> None:
    job = make(accumulation=2)
    step = job.begin()
    job.adapter.parameters["x"].grad = torch.ones(2)
    (event,) = job.end(step, 30.0, 0.1)
    assert isinstance(event, StepDone)
    assert event.loss == pytest.approx(30.0 / step.learned)


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [(math.nan, (1, 1)), (math.inf, (1, 1)), (1.0, (math.nan, 1)), (1.0, (math.inf, 1))],
)
def test_what_is_not_finite_ends_the_job_before_it_moves(
    loss: float, gradient: Sequence[float]
) -> None:
    job = make(evaluation=0)
    take(job)
    before = job.adapter.parameters["x"].tolist()
    (event,) = take(job, loss, gradient)
    assert isinstance(event, JobEnded)
    assert (event.state, event.step) == (JobStatus.DIVERGED, 1)
    assert "step 2" in event.reason
    assert not job.active
    assert job.adapter.parameters["x"].tolist() == before


def test_a_diverged_job_has_the_parameters_of_its_best_evaluation() -> None:
    adapter = Counting()
    job = make(adapter)
    job.keep_start()
    assess(job, 3.0)
    take(job)
    best = adapter.parameters["x"].tolist()
    assess(job, 2.0)
    take(job)
    assess(job, 2.5)
    assert adapter.parameters["x"].tolist() != best
    take(job, math.nan)
    assert adapter.parameters["x"].tolist() == best
    assert adapter.seen.tolist() == [1.0], "the method's state too"
    assert (job.progress.best_step, job.progress.best_loss) == (1, pytest.approx(2.0))


def test_one_that_diverged_before_any_evaluation_is_as_it_began() -> None:
    job = make()
    job.keep_start()
    assess(job, 3.0)
    take(job)
    take(job, math.nan)
    assert job.adapter.parameters["x"].tolist() == [0.0, 0.0]
    assert (job.progress.best_step, job.progress.best_loss) == (0, math.inf)


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [
        ([10.0] * STEPS, True),
        ([10.0, 11.0, 12.0, 13.0, 9.9], False),  # it comes back by itself
        ([10.0] * (STEPS - 1) + [8.9], False),
        ([10.0, 11.0, 12.0, 13.0, 8.9, 10.0, 11.0, 12.0, 13.0], False),
        ([8.9] * 20, False),  # bad, but not three times what it was
        ([50.0, 40.0, 30.0, 20.0, 10.0], False),
    ],
)
def test_a_loss_explodes_that_stays_above_three_times_the_first(
    losses: list[float], diverges: bool
) -> None:
    job = make(steps=100)
    assess(job, 3.0)
    end = None
    for loss in losses:
        end = end or ended(take(job, loss))
    assert (end is not None) == diverges
    if end is not None:
        assert end.state is JobStatus.DIVERGED
        assert end.step == STEPS
        assert "lower lr" in end.reason


def test_a_small_loss_may_grow_threefold() -> None:
    job = make(steps=100)
    assess(job, 0.05)
    assert all(ended(take(job, 2.0)) is None for _ in range(10))
    assert any(ended(take(job, 2.1)) is not None for _ in range(STEPS))


def test_without_evaluation_the_first_step_is_the_measure() -> None:
    job = make(evaluation=0, steps=100)
    take(job, 3.0)
    assert any(ended(take(job, 9.5)) is not None for _ in range(STEPS))


def test_evaluations_can_show_it_too() -> None:
    job = make(steps=100)
    assess(job, 3.0)
    take(job)
    assert ended(assess(job, 20.0)) is None
    take(job)
    end = ended(assess(job, 30.0))
    assert end is not None
    assert end.state is JobStatus.DIVERGED
    assert job.progress.best_step == 0, "neither was worth keeping"
    job = make()
    assess(job, 3.0)
    take(job)
    end = ended(assess(job, math.nan))
    assert end is not None
    assert end.state is JobStatus.DIVERGED


def test_it_stops_early_and_the_best_comes_back() -> None:
    adapter = Counting()
    job = make(adapter, patience=2, steps=20)
    job.keep_start()
    assess(job, 9.0)
    at: dict[int, list[float]] = {}
    shown = []
    for loss in (5.0, 4.0, 4.5, 3.0, 3.0, 3.1):
        take(job)
        at[job.progress.step] = adapter.parameters["x"].tolist()
        shown += assess(job, loss)
    end = ended(shown)
    assert end is not None
    assert (end.state, end.step) == (JobStatus.STOPPED_EARLY, 6)
    assert "step 4" in end.reason
    assert (job.progress.best_step, job.progress.best_loss) == (4, pytest.approx(3.0))
    assert adapter.parameters["x"].tolist() == at[4] != at[6]
    found = [(e.step, e.best) for e in shown if isinstance(e, Evaluated)]
    assert found == [(1, True), (2, True), (3, False), (4, True), (5, False), (6, False)]


def test_what_was_before_the_first_step_is_never_the_best() -> None:
    """An adapter that does nothing must not come out of training, however low its loss."""
    job = make(steps=2)
    job.keep_start()
    (event,) = assess(job, 1.0, 0.25)
    assert isinstance(event, Evaluated)
    assert not event.best
    take(job)
    assess(job, 2.0)
    take(job)
    end = ended(assess(job, 1.5))
    assert end is not None
    assert end.state is JobStatus.FINISHED
    assert "no evaluation loss was below the initial 1" in end.reason
    assert job.progress.best_step == 2
    assert (job.progress.first_loss, job.progress.first_metric) == (pytest.approx(1.0), 0.25)


def test_what_is_not_yet_what_was_asked_for_is_not_the_best() -> None:
    """AdaLoRA before its last cut: its loss is lower, and its ranks are above the budget."""
    adapter = Counting()
    adapter.settled = 4
    job = make(adapter, patience=2, steps=20)
    job.keep_start()
    assess(job, 9.0)
    shown = []
    for loss in (1.0, 1.5, 2.0, 4.0, 3.0, 3.5, 3.5):
        take(job)
        shown += assess(job, loss)
    assert [e.step for e in shown if isinstance(e, Evaluated) and e.best] == [4, 5]
    end = ended(shown)
    assert end is not None
    assert (end.state, end.step) == (JobStatus.STOPPED_EARLY, 7), "counted from step 4 on"
    assert job.progress.best_step == 5


def test_without_evaluation_the_last_step_is_the_outcome() -> None:
    job = make(evaluation=0, steps=3)
    for _ in range(2):
        assert ended(take(job)) is None
    end = ended(take(job, 0.5))
    assert end is not None
    assert end.state is JobStatus.FINISHED
    assert (job.progress.best_step, job.progress.best_loss) == (3, pytest.approx(0.5))
    assert job.adapter.parameters["x"].tolist() == pytest.approx([-16.5, -16.5])


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(3, 8, [3, 6, 8]), (0, 12, [5, 10, 12]), (20, 4, [4])],
    ids=["every 3", "once an epoch of 5", "at least in the end"],
)
def test_when_it_is_evaluated(every: int, steps: int, expected: list[int]) -> None:
    job = make(eval_every=every, steps=steps)
    found = []
    while job.active:
        take(job)
        if job.due:
            found.append(job.progress.step)
            assess(job, 1.0)
            assert not job.due, "once"
    assert found == expected


def seeds(job: Job) -> list[list[int]]:
    """The first numbers of each micro-batch's generator in the next step."""
    found = []
    for part in job.begin().parts:
        assert part.dropout is not None
        found.append(torch.randint(1 << 30, (4,), generator=part.dropout).tolist())
    return found


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    job = make(Counting(dropout=0.1), accumulation=2, seed=5)
    first = seeds(job)
    assert seeds(job) == first, "asked again, the same"
    assert first[0] != first[1]
    take(job)
    assert not any(one in first for one in seeds(job))
    assert seeds(make(Counting(dropout=0.1), accumulation=2, seed=5)) == first
    assert seeds(make(Counting(dropout=0.1), accumulation=2, seed=6)) != first
    assert all(part.dropout is None for part in make().begin().parts)


def test_a_job_goes_on_from_what_it_saved() -> None:
    def live(job: Job, steps: range) -> list[Event]:
        events = []
        for step in steps:
            events += take(job, 3.0 - step / 10, (1.0, float(step)))
            events += assess(job, [2.0, 1.2, 1.9, 1.3, 1.4][step])
        return events

    options = {"optim": {"schedule": "cosine"}, "patience": 3}
    straight, broken = make(**options), make(**options)
    for job in (straight, broken):
        job.keep_start()
        assess(job, 3.0)
        live(job, range(3))
    values, tensors = broken.save()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = make(**options)
    resumed.load(json.loads(json.dumps(values)), tensors)
    assert live(resumed, range(3, 5)) == live(straight, range(3, 5))
    assert resumed.progress == straight.progress
    assert resumed.progress.state is JobStatus.STOPPED_EARLY
    assert resumed.progress.best_step == 2, "which was before it was saved"
    for name, tensor in straight.save()[1].items():
        assert torch.equal(resumed.save()[1][name], tensor), name
    again = make(**options)
    again.load(json.loads(json.dumps(resumed.save()[0])), resumed.save()[1])
    assert (again.progress, again.active) == (straight.progress, False)
