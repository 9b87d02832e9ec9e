"""Shows a run on the terminal: one live line per job below a log; plain lines in a pipe."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from loraplex_training.report.events import (
    Evaluated,
    Event,
    JobEnded,
    JobStatus,
    Published,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepDone,
)

_SMOOTH = 0.9
"""Weight of the past in a running mean."""
_SHOWN = 160
"""Number of a prompt's characters that are shown."""
_STYLES = {JobStatus.FINISHED: "green", JobStatus.STOPPED_EARLY: "green", JobStatus.DIVERGED: "red"}


@dataclass
class _Job:
    """Figures of a job that are shown while it trains."""

    steps: int
    step: int = 0
    loss: float = 0.0
    eval_loss: float | None = None
    step_seconds: float = 0.0
    tokens_per_second: float = 0.0
    shown_at: float = float("-inf")
    bar: TaskID | None = None

    def record(self, event: StepDone) -> None:
        seconds = max(event.seconds, 1e-9)
        keep = _SMOOTH if self.step_seconds else 0.0
        self.step, self.loss = event.step, event.loss
        self.step_seconds = keep * self.step_seconds + (1 - keep) * seconds
        rate = event.tokens / seconds
        self.tokens_per_second = keep * self.tokens_per_second + (1 - keep) * rate

    @property
    def eta(self) -> float:
        """Estimated seconds until the job's last step."""
        return max(self.steps - self.step, 0) * self.step_seconds


class ProgressDisplay:
    """An `Observer` that shows bars on a terminal; `close` it to leave the terminal as it was.

    Elsewhere it prints a line about each job every `every_s` seconds.
    """

    def __init__(self, console: Console, every_s: float = 5.0) -> None:
        self._console = console
        self._every = every_s
        self._jobs: dict[str, _Job] = {}
        self._estimated_bytes = 0
        self._bars: Bars | None = None

    def on(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._begin(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case Sampled():
                self._sampled(event)
            case JobEnded():
                self._ended(event)
            case Saved() if self._bars is None:
                self._print(f"step {event.step}: saved {event.path}")
            case Published():
                where = f" on {event.server}" if event.server else ""
                named = f" as {event.version}" if event.version else ""
                self._print(f"{event.job}: published{named}{where}: {event.path} {event.digest}")
                if event.sample:
                    self._print(f"{event.job}: the server answers: {event.sample}")
            case RunEnded():
                self.close()
                self._print(finish_line(event, self._estimated_bytes))

    def close(self) -> None:
        """Stops drawing. Idempotent."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _begin(self, event: RunStarted) -> None:
        self._jobs = {
            name: _Job(steps, event.step)
            for name, steps in zip(event.jobs, event.steps, strict=True)
        }
        self._estimated_bytes = event.estimated_bytes
        goes_on = f", continuing after step {event.step}" if event.step else ""
        jobs = "1 job" if len(event.jobs) == 1 else f"{len(event.jobs)} jobs in one pass"
        expected = size_text(event.estimated_bytes) if event.estimated_bytes else "unknown"
        self._print(f"{jobs} on {event.device}{goes_on}; expected peak memory: {expected}")
        if event.precision:
            self._print(event.precision)
        for name, optimiser in zip(event.jobs, event.optimisers, strict=True):
            self._print(f"{name}: {self._jobs[name].steps} steps, {optimiser}")
        if self._console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
                refresh_per_second=4,
            )
            for name, job in self._jobs.items():
                job.bar = self._bars.add_task(
                    escape(name), total=job.steps, completed=job.step, shown=""
                )
            self._bars.start()

    def _step(self, event: StepDone) -> None:
        job = self._jobs[event.job]
        job.record(event)
        if self._bars is not None and job.bar is not None:
            self._bars.update(job.bar, completed=job.step, shown=escape(self._shown(job)))
            return
        now = time.monotonic()
        if now - job.shown_at >= self._every or job.step == job.steps:
            job.shown_at = now
            self._print(f"{event.job}: step {job.step}/{job.steps}  {self._shown(job)}")

    def _shown(self, job: _Job) -> str:
        evaluated = "" if job.eval_loss is None else f"  eval {job.eval_loss:.3f}"
        return (
            f"loss {job.loss:.3f}{evaluated}  {job.tokens_per_second:.0f} tok/s  "
            f"{duration_text(job.eta)} left  {size_text(held_bytes())}"
        )

    def _evaluated(self, event: Evaluated) -> None:
        self._jobs[event.job].eval_loss = event.loss
        metric = "" if event.metric is None else f", correct {event.metric:.1%}"
        best = ", the best so far" if event.best else ""
        self._print(
            f"{event.job}: step {event.step}: eval loss {event.loss:.4f}, "
            f"perplexity {event.perplexity:.3g}{metric}{best}"
        )

    def _sampled(self, event: Sampled) -> None:
        self._print(f"{event.job}: {event.when}: {_line(_end_of(event.prompt))}")
        self._print(f"    answer   {_line(event.answer)}")
        self._print(f"    expected {_line(event.reference)}")

    def _ended(self, event: JobEnded) -> None:
        state = event.state.value.replace("_", " ")
        self._print(f"{event.job}: {state} at step {event.step}: {event.reason}",
                  _STYLES.get(event.state, "yellow"))  # fmt: skip
        job = self._jobs[event.job]
        if self._bars is not None and job.bar is not None:
            shown = f"{state}  {escape(self._shown(job))}"
            self._bars.update(job.bar, completed=event.step, shown=shown)
            self._bars.stop_task(job.bar)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def finish_line(event: RunEnded, estimate: int) -> str:
    """Returns a sentence on a run's time, tokens and peak memory, compared with the estimate."""
    peak = size_text(event.peak_bytes)
    if estimate:
        peak += f" (expected {size_text(estimate)}, {event.peak_bytes / estimate - 1:+.0%})"
    rate = event.tokens / max(event.seconds, 1e-9)
    took = duration_text(event.seconds)
    return f"{took}, {event.tokens} tokens, {rate:.0f} tok/s, peak memory {peak}"


def held_bytes() -> int:
    """Returns the bytes that this process uses now, on the GPU if it computes on one."""
    import torch

    if torch.cuda.is_available() and (held := torch.cuda.memory_allocated()):
        return held
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the peak so far
    return pages * resource.getpagesize()


def size_text(size: float) -> str:
    """Returns a number of bytes in a suitable unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def duration_text(seconds: float) -> str:
    """Returns seconds as h:mm:ss or m:ss."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _end_of(prompt: str) -> str:
    """Returns the end of a prompt, where the question is; a template's opening is always equal."""
    return prompt if len(prompt) <= _SHOWN else "..." + prompt[-_SHOWN:]


def _line(text: str, limit: int = 200) -> str:
    """Returns a text on one line, cut to `limit` characters."""
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."
