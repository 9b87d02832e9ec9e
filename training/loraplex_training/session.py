"""A run from the command line: observers, signals, and publishing the adapters at the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Final

from loraplex import Client, InvalidRequest, LoraplexError, PermissionDenied, Unsupported
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.ops.dtypes import BY_NAME
from rich.console import Console
from rich.table import Table

from loraplex_training.publish.evaluated import keep_evaluated
from loraplex_training.publish.publish import publish
from loraplex_training.publish.target import Target, keep, kept
from loraplex_training.report import curves
from loraplex_training.report.events import JobStatus, Observer
from loraplex_training.report.lines import STDOUT, opened
from loraplex_training.report.progress import ProgressDisplay
from loraplex_training.report.record import RunRecord
from loraplex_training.run.checkpoint import is_run
from loraplex_training.run.generate import Generator, answering
from loraplex_training.run.run import Run
from loraplex_training.spec import parse as options
from loraplex_training.spec.spec import RunSpec
from loraplex_training.step.job import Job

DATA: Final = "data.json"
_GOOD: Final = (JobStatus.FINISHED, JobStatus.STOPPED_EARLY)


def start(spec: RunSpec, target: Target, events: str) -> int:
    """Trains and publishes; returns the exit code. Raises Refusal.

    `events` says where event lines go: the name of a file, "-" for standard output, or "".
    """
    spec = replace(spec, out=_free(spec).absolute())
    with _session(spec.out, events) as session:
        run = Run.start(spec, session.observers, saved=BY_NAME[target.dtype])
        keep(target, spec.out)
        _describe(run)
        return session.run(run, target)


def resume(out: Path, events: str) -> int:
    """Continues the run in directory `out` as `start` does. Raises Refusal."""
    with _session(out.absolute(), events) as session:
        run = Run.resume(out, session.observers)
        for notice in run.notices:
            session.say(f"note: {notice}")
        return session.run(run, kept(out))


@contextmanager
def _session(out: Path, events: str) -> Iterator[_Session]:
    console = Console(stderr=events == STDOUT)
    with ExitStack() as stack:
        display = stack.enter_context(closing(ProgressDisplay(console)))
        observers: list[Observer] = [RunRecord(out), display, *curves.writers(out)]
        if events:
            observers.append(stack.enter_context(opened(events)))
        yield _Session(out, console, display, observers)


@dataclass(frozen=True, slots=True)
class _Session:
    """Runs training and publishing, and reports both."""

    out: Path
    console: Console
    display: ProgressDisplay
    observers: Sequence[Observer]

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def run(self, run: Run, target: Target) -> int:
        """Trains, then publishes the adapters of the good jobs; returns the exit code."""
        if target.server and (trouble := _trouble(target.server)):
            self.say(f"note: {trouble}; the adapters are uploaded there at the end")
        for name, dataset in run.datasets.items():
            for note in dataset.report.notes():
                self.say(f"{name}: note: {note}")
        answer = answering(Generator(run.base.weights, run.spec.cache), run.text)
        export = partial(keep_evaluated, run) if run.spec.keep_evaluated else None
        with _stoppable(run) as signals:
            jobs = list(run.train(answer, export).values())
        self.display.close()
        if signals and any(job.active for job in jobs):
            self.say(f"saved; continue with: loraplex-train resume {self.out}")
            return 128 + signals[0]
        with _handling(_end):
            problems = self._publish(run, target, jobs)
        self._summary(jobs)
        if problems:
            raise Refusal.of(problems)
        return 0

    def _publish(self, run: Run, target: Target, jobs: Sequence[Job]) -> list[Problem]:
        """Publishes every job that ended well; returns why the others have no adapter."""
        good = [job for job in jobs if job.progress.state in _GOOD and job.progress.best_step]
        best = min(good, key=lambda job: job.progress.best_loss, default=None)
        problems: list[Problem] = []
        for job in jobs:
            progress, field = job.progress, f"jobs.{job.name}"
            if job not in good:
                problems.append(Problem(field, progress.reason, Reason.DIVERGED))
                continue
            if progress.first_loss is not None and progress.best_loss >= progress.first_loss:
                self.say(
                    f"{job.name}: note: its evaluation loss is not below the base model's", "yellow"
                )
            try:
                published = publish(job, run, target, target.alias if job is best else "")
                for observer in self.observers:
                    observer.on(published)
            except Refusal as error:
                problems += [Problem(field, p.message, error.reason) for p in error.problems]
        return problems

    def _summary(self, jobs: Sequence[Job]) -> None:
        """Prints a table of several jobs, sorted by evaluation loss."""
        if len(jobs) < 2:
            return
        table = Table(title="jobs, by evaluation loss", title_justify="left")
        for column in ("job", "state", "best step", "eval loss", "correct"):
            table.add_column(column, justify="left" if column in ("job", "state") else "right")
        for progress, name in sorted(
            ((job.progress, job.name) for job in jobs), key=lambda pair: pair[0].best_loss
        ):
            metric = progress.best_metric
            table.add_row(
                name,
                progress.state.value.replace("_", " "),
                str(progress.best_step),
                f"{progress.best_loss:.4f}",
                "" if metric is None else f"{metric:.1%}",
            )
        self.console.print(table)


@contextmanager
def _stoppable(run: Run) -> Iterator[list[int]]:
    """Makes SIGINT and SIGTERM stop the run; a second signal ends the process at once."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        run.stop()
        # Written directly: the signal may have come while the console was being written.
        os.write(2, b"\nstopping: the run is saved after this pass; a second signal ends it now\n")

    with _handling(stop):
        yield received


def _end(number: int, _: FrameType | None) -> None:
    """Ends the process on a signal by SystemExit, so that unfinished files are removed."""
    raise SystemExit(128 + number)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _trouble(server: str) -> str:
    """Why adapters could not be uploaded to a server now; "" if nothing is known of it.

    A wrong address or key shows before the training, not after it.
    """
    try:
        with Client(server) as client:
            client.get_model(timeout=2.0)
    except (InvalidRequest, PermissionDenied) as error:
        return f"the server {server} cannot be used now: {error}"
    except Unsupported:
        return ""
    except LoraplexError:
        return f"no server answers at {server} now"
    return ""


def _free(spec: RunSpec) -> Path:
    """Returns the run's directory; for the default one, adds a number if it already has a run."""
    if spec.out.parent != options.RUNS or not is_run(spec.out):
        return spec.out
    numbered = (spec.out.with_name(f"{spec.out.name}-{number}") for number in count(2))
    return next(out for out in numbered if not is_run(out))


def _describe(run: Run) -> None:
    """Writes a description of the jobs' data into the run's directory."""
    data = {
        name: {
            "sha256": dataset.digest,
            "eval_sha256": dataset.eval_digest,
            "train": asdict(dataset.report.train),
            "evaluation": asdict(dataset.report.evaluation),
            "files": [asdict(file) for file in dataset.report.files],
            "notes": dataset.report.notes(),
        }
        for name, dataset in run.datasets.items()
    }
    with suppress(OSError):
        (run.spec.out / DATA).write_text(json.dumps(data, indent=2) + "\n", "utf-8")
