"""A run: jobs that train together over one base model until all have ended or `stop` is called.

In a round, every active job takes one optimiser step. The k-th micro-batches of all jobs go through
the base model in one pass; a job with fewer micro-batches takes no part in the remaining passes of
the round, and a job that has ended takes part in none. Then each job updates its own parameters
(see `step.job`), and the jobs that are due are evaluated together. Up to rounding, a job's result
does not depend on the other jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import TypeAlias

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.ops.linear import BaseLinear

from loraplex_training.methods.base import Observe
from loraplex_training.report.events import (
    Event,
    Exported,
    JobStatus,
    Observer,
    RunEnded,
    RunStarted,
    Saved,
)
from loraplex_training.run import costs, evaluate, precision, preflight
from loraplex_training.run.checkpoint import CONFIG, RunFolder, RunSnapshot, is_run
from loraplex_training.run.evaluate import Answer
from loraplex_training.run.inputs import RunInputs, device_of
from loraplex_training.run.process_settings import process_settings
from loraplex_training.spec.parse import (
    absolute,
    check,
    from_mapping,
    read,
    to_mapping,
    to_toml,
)
from loraplex_training.spec.spec import RunSpec
from loraplex_training.step.job import Job
from loraplex_training.step.joint import JointPass, Part
from loraplex_training.step.memory import peak_bytes

_FORMAT = 1

Export: TypeAlias = Callable[[Job], Path]
"""Writes a job's adapter as it is now; returns its directory. May raise Refusal."""


class Run:
    """Jobs in training. `stop` and `cancel` are thread-safe; all else belongs to one thread.

    Attributes:
        round: number of completed rounds, which is the step of every active job.
        seconds: training time so far, over all processes that have worked on the run.
    """

    def __init__(
        self,
        spec: RunSpec,
        inputs: RunInputs,
        jobs: list[Job],
        folder: RunFolder,
        observers: Sequence[Observer],
    ) -> None:
        """Use `start` or `resume`."""
        self.spec, self.inputs = spec, inputs
        self.base, self.text, self.datasets = inputs.base, inputs.text, inputs.datasets
        self.joint = JointPass(
            inputs.base.weights,
            checkpointing=spec.checkpointing,
            products=precision.products_of(spec),
        )
        self.round = 0
        self.seconds = 0.0
        self._answer: Answer | None = None
        self._export: Export | None = None
        self._jobs = jobs
        self._folder = folder
        self._observers = observers
        self._prepared = False
        self._saved = False
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()

    @classmethod
    def start(
        cls,
        spec: RunSpec,
        observers: Sequence[Observer] = (),
        inputs: RunInputs | None = None,
        saved: torch.dtype = torch.float32,
    ) -> Run:
        """Makes a new run. Everything is checked before its directory is made.

        That includes the adapters that it will publish, whose tensors are `saved` in that type.
        Raises Refusal: CONFIG_INVALID, DATA_INVALID, METHOD_INVALID, BUSY, DISK_FULL,
        OUT_OF_MEMORY.
        """
        check(spec)
        spec = absolute(spec)
        if is_run(spec.out):
            raise Refusal(
                Reason.CONFIG_INVALID,
                f"{spec.out} already holds a run; resume it, or choose another --out",
            )
        with process_settings(spec):
            spec = precision.chosen(spec, device_of(spec))
            inputs = inputs or RunInputs.open(spec)
            jobs = inputs.jobs(spec)
            preflight.check(jobs, inputs.base.weights.info, saved)
        folder = RunFolder(spec.out, spec.keep)
        try:
            folder.write_config(to_toml(spec))
        except BaseException:
            folder.close()
            raise
        return cls(spec, inputs, jobs, folder, observers)

    @classmethod
    def resume(
        cls, out: Path, observers: Sequence[Observer] = (), inputs: RunInputs | None = None
    ) -> Run:
        """Restores the run in directory `out` from its newest undamaged checkpoint.

        Raises Refusal: CHECKPOINT_INVALID (no run, or only damaged checkpoints), BASE_MISMATCH,
        DATA_INVALID (the data has changed), BUSY, and the reasons of `start`.
        """
        out = out.absolute()
        if not is_run(out):
            raise Refusal(
                Reason.CHECKPOINT_INVALID, f"{out} is not the directory of a run: no {CONFIG} in it"
            )
        folder = RunFolder(out)
        try:
            snapshot = folder.newest()
            spec = _spec_of(out, snapshot)
            folder.keep = spec.keep
            with process_settings(spec):
                spec = precision.chosen(spec, device_of(spec))
                inputs = inputs or RunInputs.open(spec)
                if snapshot is not None:
                    inputs.check_same(snapshot.values["identity"], spec)
                run = cls(spec, inputs, inputs.jobs(spec), folder, observers)
                if snapshot is not None:
                    run._load(snapshot)
        except BaseException:
            folder.close()
            raise
        return run

    @property
    def notices(self) -> Sequence[str]:
        """Sentences about checkpoints that were skipped when the run was resumed."""
        return self._folder.notices

    @property
    def jobs(self) -> Sequence[Job]:
        return self._jobs

    def stop(self) -> None:
        """Makes `train` save the run and return before the next pass."""
        self._stopping.set()

    def cancel(self, job: str) -> None:
        """Ends one job before its next step; its result is its best parameters so far."""
        if job not in self.datasets:
            raise Refusal(Reason.CONFIG_INVALID, f"there is no job {job!r} in this run")
        self._cancelled.add(job)

    def train(
        self, answer: Answer | None = None, export: Export | None = None
    ) -> Mapping[str, Job]:
        """Trains until every job has ended or `stop` was called, and saves the run either way.

        Returns the jobs by name: their adapters have the best parameters, or the current ones if
        the run was stopped. `answer` generates the answers for metrics and samples; without it
        there are none. `export` is called at every evaluation after a step whose loss is finite.

        Raises Refusal: OUT_OF_MEMORY, DISK_FULL. The last checkpoint is then undamaged, and the
        run can be resumed.
        """
        self._answer, self._export = answer, export
        began, before = time.monotonic(), self.seconds
        tokens = sum(job.progress.tokens for job in self._jobs)
        try:
            with process_settings(self.spec):
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
        return {job.name: job for job in self._jobs}

    def _prepare(self) -> bool:
        """Does what precedes the first step. Returns False if stopped before that was complete."""
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

    def _observe(self, job: Job) -> Observe:
        def observe(linear: BaseLinear, batches: int) -> None:
            every = (b for number in range(job.batches.steps) for b in job.batches.step(number))
            for batch in islice(every, batches):
                self.joint.backward([Part(None, batch, 1 / max(1, batch.learned))], linear)

        return observe

    def _round(self) -> None:
        """Takes one optimiser step of every active job, or none at all if stopped before that."""
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
        """Evaluates jobs before their first step or after one. Returns False if stopped."""
        sums = evaluate.losses(self.joint, jobs, self._stopping.is_set)
        if sums is None:
            return False
        answer = self._answer and evaluate.remembered(self._answer)
        for job, total in zip(jobs, sums, strict=True):
            examples = self.datasets[job.name].evaluation
            share = evaluate.metric(job, self._delta(job), examples, answer)
            exported = self._exported(job, total)  # before the job can end with other parameters
            self._emit(job.evaluate(total, share))
            self._emit(exported)
            if answer is not None and (job.progress.step == 0 or not job.active):
                delta = self._delta(job)  # has the best parameters if the job has just ended
                self._emit(evaluate.answers(job, delta, examples, answer, self.text.decode))
        self._saved = False
        return True

    def _exported(self, job: Job, loss: float) -> list[Event]:
        """Exports a job's adapter if that is wanted and it has its final form."""
        step = job.progress.step
        if self._export is None or not isfinite(loss) or step == 0 or step < job.adapter.settled:
            return []
        return [Exported(job.name, step, self._export(job))]

    def _delta(self, job: Job) -> AdapterDelta | None:
        """The job's current adapter; None, the plain base model, before the first step."""
        return evaluate.delta(job) if job.progress.step else None

    def _leave_cancelled(self) -> None:
        for job in self._active():
            if job.name in self._cancelled:
                self._emit([job.leave(JobStatus.CANCELLED, "it was cancelled")])
                self._saved = False

    def _save(self) -> None:
        saved = {job.name: job.save() for job in self._jobs}
        values = {
            "format": _FORMAT,
            "spec": to_mapping(self.spec),
            "identity": self.inputs.identity,
            "round": self.round,
            "seconds": self.seconds,
            "jobs": {name: values for name, (values, _) in saved.items()},
        }
        path = self._folder.save(RunSnapshot(values, {name: t for name, (_, t) in saved.items()}))
        self._saved = True
        self._emit([Saved(self.round, path)])

    def _load(self, snapshot: RunSnapshot) -> None:
        values = snapshot.values
        for job in self._jobs:
            job.load(values["jobs"][job.name], snapshot.tensors[job.name])
        self.round, self.seconds = values["round"], values["seconds"]
        self._prepared = self._saved = True

    def _active(self) -> list[Job]:
        return [job for job in self._jobs if job.active]

    def _started(self) -> RunStarted:
        return RunStarted(
            tuple(job.name for job in self._jobs),
            tuple(job.batches.steps for job in self._jobs),
            self.round,
            str(self.base.weights.embed.device),
            costs.of(self.base.weights, self._jobs, self.spec).total,
            tuple(job.optimiser for job in self._jobs),
            f"products in {self.spec.products}, dense tensors in {self.spec.dtype}",
            tuple(job.progress.tokens for job in self._jobs),
        )

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            for observer in self._observers:
                observer.on(event)


def _spec_of(out: Path, snapshot: RunSnapshot | None) -> RunSpec:
    """Returns the options that the run was started with, with `out` in place of its own.

    The directory may have been moved since then.
    """
    if snapshot is None:
        spec = read(config=out / CONFIG)
    elif snapshot.values.get("format") != _FORMAT:
        raise Refusal(
            Reason.CHECKPOINT_INVALID,
            f"the checkpoints in {out} have format {snapshot.values.get('format')}, and this "
            f"trainer reads format {_FORMAT}; resume with the version that wrote them",
        )
    else:
        saved = snapshot.values["spec"]
        # Runs of earlier versions do not name the type of their products, which was float32.
        options = {"products": "float32", **saved["run"]}
        spec = from_mapping({**saved, "run": options})
    return replace(spec, out=out)
