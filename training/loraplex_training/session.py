"""A run from the command line: observers around it, signals, and the hand-over in the end."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import IO, Final

from loraplex import Client, LoraplexError
from loraplex_model.base.refusal import Reason, Refusal
from rich.console import Console
from rich.table import Table

from loraplex_training.publish.publish import publish
from loraplex_training.publish.target import Target, keep, kept
from loraplex_training.report import curves
from loraplex_training.report.events import Event, JobState, Observer, Published
from loraplex_training.report.lines import encode
from loraplex_training.report.progress import Progress
from loraplex_training.report.record import Record
from loraplex_training.run.checkpoint import is_run
from loraplex_training.run.generate import Generator, answering
from loraplex_training.run.run import Outcome, Run
from loraplex_training.spec import parse as options
from loraplex_training.spec.spec import RunSpec

DATA: Final = "data.json"
STDOUT: Final = "-"
_GOOD: Final = (JobState.FINISHED, JobState.STOPPED_EARLY)


def begin(spec: RunSpec, target: Target, events: str) -> int:
    """Trains and hands over; returns the exit code. Raises Refusal."""
    spec = replace(spec, out=_free(spec).absolute())
    with _Session(spec.out, events) as session:
        run = Run.start(spec, session.observers)
        keep(target, spec.out)
        _describe(run)
        return session.run(run, target)


def resume(out: Path, events: str) -> int:
    """Goes on with the run in `out`. Raises Refusal."""
    with _Session(out.absolute(), events) as session:
        run = Run.resume(out, session.observers)
        for notice in run.notices:
            session.say(f"note: {notice}")
        return session.run(run, kept(out))


class EventLines:
    """An `Observer` that writes events as lines; a reader that is gone stops nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file: IO[str] | None = file

    def on(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            self._file.write(encode(event) + "\n")
            self._file.flush()
        except OSError:
            self._file = None


class _Session:
    """What is around a run while it runs."""

    def __init__(self, out: Path, events: str) -> None:
        """`events` is a file's name, "-" for standard output, or ""."""
        self._out = out
        self._console = Console(stderr=events == STDOUT)
        self._progress = Progress(self._console)
        self._open = ExitStack()
        self.observers: list[Observer] = [Record(out), self._progress, *curves.writers(out)]
        if events:
            self.observers.append(EventLines(self._file(events)))

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def run(self, run: Run, target: Target) -> int:
        """Trains, then publishes what came out well; the exit code."""
        if target.server and not _answers(target.server):
            self.say(
                f"note: no server answers at {target.server} now; the adapter is sent there in "
                "the end"
            )
        for name, dataset in run.datasets.items():
            for note in dataset.report.notes():
                self.say(f"{name}: note: {note}")
        run.answer = answering(Generator(run.base.weights, run.spec.cache), run.text)
        with _stoppable(run) as signals:
            outcomes = list(run.train().values())
        self._progress.close()
        if signals and any(o.state is JobState.TRAINING for o in outcomes):
            self.say(f"saved; go on with: loraplex-train resume {self._out}")
            return 128 + signals[0]
        with _ending_on_sigterm():
            done = self._publish(run, target, outcomes)
        self._summary(outcomes)
        return 0 if done and all(outcome.state in _GOOD for outcome in outcomes) else 1

    def _publish(self, run: Run, target: Target, outcomes: Sequence[Outcome]) -> bool:
        """Hands over every job that ended well; whether all that should be could be."""
        good = [outcome for outcome in outcomes if outcome.state in _GOOD and outcome.best_step]
        best = min(good, key=lambda outcome: outcome.best_loss, default=None)
        done = len(good) == len(outcomes)
        for outcome in good:
            first = outcome.progress.first_loss
            if first is not None and outcome.best_loss >= first:
                self.say(
                    f"{outcome.job}: note: its evaluation loss is no lower than the base's",
                    "yellow",
                )
            try:
                alias = target.alias if outcome is best else ""
                self._tell(publish(outcome, run, target, alias))
            except Refusal as error:
                done = False
                for problem in error.problems:
                    print(
                        f"error: {error.reason}: {outcome.job}: {problem.message}", file=sys.stderr
                    )
        return done

    def _tell(self, event: Published) -> None:
        for observer in self.observers:
            observer.on(event)

    def _summary(self, outcomes: Sequence[Outcome]) -> None:
        """One line for each job of several, the best first."""
        if len(outcomes) < 2:
            return
        table = Table(title="jobs, by evaluation loss", title_justify="left")
        for column in ("job", "state", "best step", "eval loss", "right"):
            table.add_column(column, justify="left" if column in ("job", "state") else "right")
        for outcome in sorted(outcomes, key=lambda o: o.best_loss):
            right = outcome.progress.best_metric
            table.add_row(
                outcome.job,
                outcome.state.value.replace("_", " "),
                str(outcome.best_step),
                f"{outcome.best_loss:.4f}",
                "" if right is None else f"{right:.1%}",
            )
        self._console.print(table)

    def _file(self, events: str) -> IO[str]:
        if events == STDOUT:
            return sys.stdout
        try:
            return self._open.enter_context(Path(events).open("a", encoding="utf-8"))
        except OSError as error:
            raise Refusal(Reason.CONFIG_INVALID, f"--events {events}: {error.strerror}") from None

    def __enter__(self) -> _Session:
        self._open.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


@contextmanager
def _stoppable(run: Run) -> Iterator[list[int]]:
    """SIGINT and SIGTERM make the run save and end; the second one ends the process at once."""
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        run.stop()
        # Not by way of a console, in whose midst this may have come.
        os.write(2, b"\nstopping: the run is saved after this pass; once more ends it at once\n")

    with _handling(stop):
        yield received


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM and SIGINT end the process in an orderly way: what is half written is removed."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling(end):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _answers(server: str) -> bool:
    try:
        with Client(server) as client:
            client.health(timeout=2.0)
    except LoraplexError:
        return False
    return True


def _free(spec: RunSpec) -> Path:
    """The run's folder; in the usual place the next free one with a number."""
    if spec.out.parent != options.RUNS or not is_run(spec.out):
        return spec.out
    number = 2
    while is_run(spec.out.with_name(f"{spec.out.name}-{number}")):
        number += 1
    return spec.out.with_name(f"{spec.out.name}-{number}")


def _describe(run: Run) -> None:
    """Writes down what the jobs learn from."""
    data = {
        name: {
            "sha256": dataset.digest,
            "eval_sha256": dataset.eval_digest,
            "train": asdict(dataset.report.train),
            "evaluation": asdict(dataset.report.evaluation),
            "notes": dataset.report.notes(),
        }
        for name, dataset in run.datasets.items()
    }
    with suppress(OSError):
        (run.spec.out / DATA).write_text(json.dumps(data, indent=2) + "\n", "utf-8")
