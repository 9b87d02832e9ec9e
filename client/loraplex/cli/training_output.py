"""Prints training jobs: a progress bar on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loraplex.cli import output
from loraplex.jobs.events import JobEvent
from loraplex.training import JobCheckpoint, JobProgress, JobState, TrainingJob


def write_jobs(jobs: Sequence[TrainingJob]) -> None:
    """Prints a table on a terminal; elsewhere tab-separated lines."""
    titles = ("job", "name", "state", "method", "step", "steps", "loss", "created")
    output.write_table(titles, [_row(job) for job in jobs])


def write_queued(job: TrainingJob) -> None:
    """Prints the id of a new job, and a hint how to follow it."""
    print(job.job_id)
    output.note(f"{job.state}; follow it with: loraplex train watch {job.job_id}")


def write_job(job: TrainingJob) -> None:
    """Prints a line `name: value` for each field that is set, and for those of its parts."""
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for name, part in dataclasses.asdict(value).items():
                _write_field(f"{field.name}.{name}", part)
        else:
            _write_field(field.name, value)


def _write_field(name: str, value: object) -> None:
    """Prints a line for a value, or one for each item of a tuple."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, JobCheckpoint):
            print(f"{name}: {item.adapter_id} {item.digest}")
        elif item is not None:
            text = output.plain(item)
            print(f"{name}: {_safe(text) if isinstance(text, str) else text}")


def write_events(events: Sequence[JobEvent]) -> None:
    """Prints a line for each event: its time, and what happened."""
    for event in events:
        time = event.time.isoformat(timespec="seconds")
        print(f"{time} {_safe(_what(event))}")


def _what(event: JobEvent) -> str:
    """Returns what happened, in one line."""
    if event.state is not None:
        return str(event.state)
    if event.progress is not None:
        return f"step {event.progress.step}{_numbers(event.progress)}"
    if event.evaluation is not None:
        return f"evaluation at step {event.evaluation.step}: loss {event.evaluation.loss:.4f}"
    if event.checkpoint is not None:
        return f"registered {event.checkpoint.adapter_id}"
    if event.samples is not None:
        said = "; ".join(repr(sample.answer) for sample in event.samples.samples)
        return f"answers at step {event.samples.step}: {said}"
    return event.message or ""


@contextmanager
def following(as_json: bool) -> Iterator[Callable[[TrainingJob], None]]:
    """Yields a function that shows a job: as JSON, or on standard error as a bar or lines."""
    if as_json:
        yield lambda job: output.write_json(job, flush=True)
        return
    if not sys.stderr.isatty():
        yield lambda job: output.remark(_line(job))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
               TextColumn("{task.fields[more]}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("waiting", total=None, more="")

        def show(job: TrainingJob) -> None:
            now = job.progress
            bar.update(
                task,
                description=f"{job.name} {_state(job)}",
                completed=now.step if now else 0,
                total=now.steps if now else None,
                more=_numbers(now) if now else "",
            )

        yield show


def write_end(job: TrainingJob) -> None:
    """Prints the adapter on standard output, or on standard error why there is none."""
    if job.result is not None:
        print(f"{job.name}@{job.result.version} {job.result.digest}")
        if job.result.ending:
            output.note(_safe(job.result.ending))
        if job.result.warning:
            output.remark(f"loraplex: {_safe(job.result.warning)}")
    elif job.error is not None:
        for line in job.error.log:
            output.remark(f"  {_safe(line)}")
        output.remark(f"loraplex: {_safe(job.error.message)} ({job.error.reason})")
    else:
        output.remark(f"loraplex: the job was {job.state}")


def _row(job: TrainingJob) -> tuple[object, ...]:
    now = job.progress
    return (
        *(job.job_id, job.name, _state(job), job.method),
        *((now.step, now.steps) if now else ("-", "-")),
        f"{now.loss:.4f}" if now and now.loss is not None else "-",
        job.create_time.isoformat(timespec="seconds") if job.create_time else "-",
    )


def _line(job: TrainingJob) -> str:
    now = job.progress
    text = f"{job.name} {_state(job)}"
    return f"{text} {now.step}/{now.steps}{_numbers(now)}" if now else text


def _state(job: TrainingJob) -> str:
    before = job.queue_position if job.state is JobState.QUEUED else 0
    return f"{job.state} behind {before}" if before else str(job.state)


def _numbers(now: JobProgress) -> str:
    text = ""
    if now.loss is not None:
        text += f" loss {now.loss:.4f}"
    if now.evaluation is not None:
        text += f" eval {now.evaluation.loss:.4f}"
        if now.evaluation.metric is not None:
            text += f" metric {now.evaluation.metric:.3f}"
    if now.tokens_per_second:
        text += f" {now.tokens_per_second:.0f} tok/s"
    if now.remaining:
        minutes, seconds = divmod(round(now.remaining), 60)
        text += f" {minutes}:{seconds:02d} left"
    return text


def _safe(text: str) -> str:
    """Returns the text without characters that control a terminal."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
