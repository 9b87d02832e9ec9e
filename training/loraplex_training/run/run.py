"""A run: jobs that train together over one base, to the end, or until it is told to stop.

In a round every job that still trains takes one optimiser step. Its k-th micro-batches go through
the base in one pass; a job with fewer of them sits out the rest of the round, and one that has
ended is in no pass any more. Then each moves its own parameters (see `job`), and those that are due
are evaluated, together. What a job becomes does not depend on the others, up to rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.ops.linear import BaseLinear

from loraplex_training.methods.base import TrainedAdapter
from loraplex_training.report.events import (
    Event,
    JobState,
    Observer,
    RunEnded,
    RunStarted,
    Saved,
)
from loraplex_training.run import costs, evaluate
from loraplex_training.run.checkpoint import CONFIG, RunFolder, Snapshot, is_run
from loraplex_training.run.evaluate import Answer
from loraplex_training.run.inputs import Ground
from loraplex_training.run.process_settings import surroundings
from loraplex_training.spec.parse import (
    absolute,
    check,
    from_mapping,
    from_toml,
    to_mapping,
    to_toml,
)
from loraplex_training.spec.spec import JobSpec, RunSpec
from loraplex_training.step.job import Job, Progress
from loraplex_training.step.joint import JointPass, Part
from loraplex_training.step.memory import peak_bytes
from loraplex_training.step.optimiser import expected

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
        adapter: with its best parameters, or, if the job still trains, with those it has.
        progress: all that is known of how it went.
        data_digest, eval_digest: SHA-256 (hex) of the data.
    """

    spec: JobSpec
    progress: Progress
    adapter: TrainedAdapter
    data_digest: str
    eval_digest: str

    @property
    def job(self) -> str:
        return self.spec.name

    @property
    def state(self) -> JobState:
        return self.progress.state

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def best_step(self) -> int:
        """0 if no step was worth keeping: then the adapter is as it was before the first."""
        return self.progress.best_step

    @property
    def best_loss(self) -> float:
        return self.progress.best_loss


class Run:
    """Jobs in training. `stop` and `cancel` may be called from any thread, all else from one.

    Attributes:
        answer: generates answers for metrics and samples; set before `train`, or there are none.
        notices: sentences on what was found when the run was resumed.
        round: rounds done; the step of every job that still trains.
        seconds: of training so far, in all processes together.
    """

    def __init__(
        self, spec: RunSpec, ground: Ground, folder: RunFolder, observers: Sequence[Observer]
    ) -> None:
        """Use `start` or `resume`."""
        self.spec, self.ground = spec, ground
        self.base, self.text, self.datasets = ground.base, ground.text, ground.datasets
        self.joint = JointPass(ground.base.weights, checkpointing=spec.checkpointing)
        self.answer: Answer | None = None
        self.round = 0
        self.seconds = 0.0
        self._jobs: list[Job] = []
        self._folder = folder
        self._observers = observers
        self._prepared = False
        self._saved = False
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()

    @classmethod
    def start(
        cls, spec: RunSpec, observers: Sequence[Observer] = (), ground: Ground | None = None
    ) -> Run:
        """A new run. Everything is checked before its folder is made.

        Raises Refusal: CONFIG_INVALID, DATA_INVALID, METHOD_INVALID, BUSY, DISK_FULL,
        OUT_OF_MEMORY.
        """
        check(spec)
        spec = absolute(spec)
        if is_run(spec.out):
            raise Refusal(
                Reason.CONFIG_INVALID,
                f"{spec.out} holds a run already; resume it, or choose another folder for this one",
            )
        with surroundings(spec):
            ground = ground or Ground.open(spec)
            jobs = ground.jobs(spec)
        folder = RunFolder(spec.out, spec.keep)
        try:
            folder.write_config(to_toml(spec))
        except BaseException:
            folder.close()
            raise
        run = cls(spec, ground, folder, observers)
        run._jobs = jobs
        return run

    @classmethod
    def resume(
        cls, out: Path, observers: Sequence[Observer] = (), ground: Ground | None = None
    ) -> Run:
        """The run of a folder, at its newest whole checkpoint.

        Raises Refusal: CHECKPOINT_INVALID (no run, or nothing whole), BASE_MISMATCH,
        DATA_INVALID (the data has changed), BUSY, and what `start` raises.
        """
        out = out.absolute()
        if not is_run(out):
            raise Refusal(
                Reason.CHECKPOINT_INVALID, f"{out} is no run's folder: it has no {CONFIG}"
            )  # fmt: skip
        folder = RunFolder(out)
        try:
            snapshot = folder.newest()
            spec = _spec_of(out, snapshot)
            folder.keep = spec.keep
            with surroundings(spec):
                ground = ground or Ground.open(spec)
                if snapshot is not None:
                    ground.check_same(snapshot.values["identity"], spec)
                run = cls(spec, ground, folder, observers)
                run._jobs = ground.jobs(spec)
                if snapshot is not None:
                    run._load(snapshot)
        except BaseException:
            folder.close()
            raise
        return run

    @property
    def notices(self) -> Sequence[str]:
        return self._folder.notices

    @property
    def jobs(self) -> Sequence[Job]:
        return self._jobs

    def stop(self) -> None:
        """Makes `train` save and return soon: before the next pass."""
        self._stopping.set()

    def cancel(self, job: str) -> None:
        """Ends one job before its next step; its best parameters so far are its outcome."""
        if job not in self.datasets:
            raise Refusal(Reason.CONFIG_INVALID, f"there is no job {job!r} in this run")
        self._cancelled.add(job)

    def train(self) -> Mapping[str, Outcome]:
        """Trains until every job has ended, or `stop` was called; saved, either way.

        Raises Refusal: OUT_OF_MEMORY, DISK_FULL; then the last checkpoint is whole, and the run
        can be resumed.
        """
        began, before = time.monotonic(), self.seconds
        tokens = sum(job.progress.tokens for job in self._jobs)
        try:
            with surroundings(self.spec):
                self._emit([self._started()])
                self._prepared = self._prepared or self._prepare()
                while self._prepared and not self._stopping.is_set():
                    self._leave_cancelled()
                    if not self._active():
                        break
                    due = [job for job in self._active() if job.due]
                    if due:
                        self._evaluate(due)
                    else:
                        self._round()
                    self.seconds = before + time.monotonic() - began
                    waiting = self._saved or any(job.due for job in self._jobs)
                    if self.round % self.spec.save_every == 0 and not waiting:
                        self._save()
                self._leave_cancelled()
                if self._prepared and not self._saved:
                    self._save()
                tokens = sum(job.progress.tokens for job in self._jobs) - tokens
                self._emit([RunEnded(time.monotonic() - began, tokens, peak_bytes())])
        finally:
            self._folder.close()
        return {job.name: self._outcome(job) for job in self._jobs}

    def _prepare(self) -> bool:
        """What comes before the first step; False if told to stop meanwhile."""
        for job in self._jobs:
            if self._stopping.is_set():
                return False
            job.adapter.prepare(self._observe(job))
            job.keep_start()
        self._leave_cancelled()
        if not self._evaluate([job for job in self._active() if job.evaluation]):
            return False
        self._save()
        return True

    def _observe(self, job: Job) -> Any:
        def observe(linear: BaseLinear, batches: int) -> None:
            passed = 0
            for number in range(job.batches.steps):
                for batch in job.batches.step(number):
                    if passed == batches:
                        return
                    part = Part(None, batch, 1 / max(1, batch.learned))
                    self.joint.backward([part], linear)
                    passed += 1

        return observe

    def _round(self) -> None:
        """One optimiser step of every job that trains; nothing, if told to stop meanwhile."""
        jobs = self._active()
        steps = [job.begin() for job in jobs]
        sums = [0.0] * len(jobs)
        began = time.perf_counter()
        for number in range(max((len(step.parts) for step in steps), default=0)):
            if self._stopping.is_set():
                for job in jobs:
                    job.abandon()
                return
            taking = [i for i, step in enumerate(steps) if number < len(step.parts)]
            losses = self.joint.backward([steps[i].parts[number] for i in taking])
            for i, loss in zip(taking, losses, strict=True):
                sums[i] += loss
        seconds = time.perf_counter() - began
        for job, step, loss in zip(jobs, steps, sums, strict=True):
            self._emit(job.end(step, loss, seconds))
        self.round += 1
        self._saved = False

    def _evaluate(self, jobs: Sequence[Job]) -> bool:
        """Evaluates them, before their first step or after one; False if told to stop meanwhile."""
        sums = evaluate.losses(self.joint, jobs, self._stopping.is_set)
        if sums is None:
            return False
        answer = self.answer and evaluate.remembered(self.answer)
        for job, total in zip(jobs, sums, strict=True):
            examples = self.datasets[job.name].evaluation
            share = evaluate.metric(job, self._delta(job), examples, answer)
            self._emit(job.evaluate(total, share))
            if answer is not None and (job.progress.step == 0 or not job.active):
                delta = self._delta(job)  # the best one's, if the job has ended now
                self._emit(evaluate.answers(job, delta, examples, answer, self.text.decode))
        self._saved = False
        return True

    def _delta(self, job: Job) -> AdapterDelta | None:
        """The bare base before the first step."""
        return evaluate.delta(job) if job.progress.step else None

    def _leave_cancelled(self) -> None:
        for job in self._active():
            if job.name in self._cancelled:
                self._emit([job.leave(JobState.CANCELLED, "it was cancelled")])
                self._saved = False

    def _save(self) -> None:
        saved = {job.name: job.save() for job in self._jobs}
        values = {
            "format": _FORMAT,
            "spec": to_mapping(self.spec),
            "identity": self.ground.identity,
            "round": self.round,
            "seconds": self.seconds,
            "jobs": {name: values for name, (values, _) in saved.items()},
        }
        path = self._folder.save(Snapshot(values, {name: t for name, (_, t) in saved.items()}))
        self._saved = True
        self._emit([Saved(self.round, path)])

    def _load(self, snapshot: Snapshot) -> None:
        values = snapshot.values
        for job in self._jobs:
            job.load(values["jobs"][job.name], snapshot.tensors[job.name])
        self.round, self.seconds = values["round"], values["seconds"]
        self._prepared = self._saved = True

    def _active(self) -> list[Job]:
        return [job for job in self._jobs if job.active]

    def _started(self) -> RunStarted:
        states = [
            str(expected(job.spec.optim, job.adapter.parameters, job.adapter.groups()))
            for job in self._jobs
        ]
        return RunStarted(
            tuple(job.name for job in self._jobs),
            tuple(job.batches.steps for job in self._jobs),
            self.round,
            str(self.base.weights.embed.device),
            costs.of(self.base.weights, self._jobs, self.spec).total,
            tuple(states),
        )

    def _outcome(self, job: Job) -> Outcome:
        data = self.datasets[job.name]
        return Outcome(job.spec, job.progress, job.adapter, data.digest, data.eval_digest)

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            for observer in self._observers:
                observer.on(event)


def _spec_of(out: Path, snapshot: Snapshot | None) -> RunSpec:
    """What the run was asked to do; its folder may have been moved."""
    if snapshot is None:
        spec = from_toml((out / CONFIG).read_text("utf-8"))
    elif snapshot.values.get("format") != _FORMAT:
        raise Refusal(
            Reason.CHECKPOINT_INVALID,
            f"the checkpoints in {out} are of format {snapshot.values.get('format')}, and this is "
            f"the trainer of format {_FORMAT}; resume with the one that wrote them",
        )
    else:
        spec = from_mapping(snapshot.values["spec"])
    return replace(spec, out=out)
