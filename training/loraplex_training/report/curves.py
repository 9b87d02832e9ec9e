"""Curves of a run: in TensorBoard while it runs, as a picture at its end, and in MLflow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraplex_training.report import record
from loraplex_training.report.events import (
    Evaluated,
    Event,
    JobEnded,
    Observer,
    RunEnded,
    RunStarted,
    StepDone,
    until_failure,
)

PICTURE = "curves.png"
TENSORBOARD = "tensorboard"

Points = list[tuple[int, float]]


def writers(folder: Path) -> list[Observer]:
    """Returns the observers that write a run's curves, to MLflow only if that is installed."""
    found: list[Observer] = [TensorBoard(folder / TENSORBOARD), Picture(folder)]
    if find_spec("mlflow") is not None:
        found.append(MLflow())
    return found


def scalars(event: StepDone | Evaluated) -> dict[str, float]:
    """Returns the values of an event by the names of their curves."""
    if isinstance(event, StepDone):
        return {
            "train/loss": event.loss,
            "train/rate": event.rate,
            "train/norm": event.norm,
            "train/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
        }
    values = {"eval/loss": event.loss, "eval/perplexity": event.perplexity}
    return values if event.metric is None else {**values, "eval/metric": event.metric}


class TensorBoard:
    """An `Observer` that writes TensorBoard files, one directory per job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, Any] = {}

    @until_failure("TensorBoard curves are not written", ImportError, OSError)
    def on(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            board = import_module("torch.utils.tensorboard")
            # Hides the values of steps that a resumed run repeats.
            purge = event.step + 1 if event.step else None
            for job in event.jobs:
                folder = str(self._folder / job)
                self._writers[job] = board.SummaryWriter(folder, purge_step=purge)
        elif isinstance(event, StepDone | Evaluated):
            for name, value in scalars(event).items():
                self._writers[event.job].add_scalar(name, value, event.step)
        elif isinstance(event, JobEnded):
            self._writers[event.job].flush()
        elif isinstance(event, RunEnded):
            for writer in self._writers.values():
                writer.close()


class Picture:
    """An `Observer` that draws `curves.png` at the end, from the run's record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @until_failure("the picture of the curves is not drawn", ImportError, OSError)
    def on(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            draw(record.read(self._folder), self._folder / PICTURE)


class MLflow:
    """An `Observer` that logs to MLflow, one MLflow run per job. MLflow's own settings apply."""

    def __init__(self) -> None:
        self._mlflow = import_module("mlflow")
        self._runs: dict[str, str] = {}

    @until_failure("MLflow curves are not written", Exception)  # a server may fail in any way
    def on(self, event: Event) -> None:
        client = self._mlflow.MlflowClient
        if isinstance(event, RunStarted):
            for job in event.jobs:
                run = self._mlflow.start_run(run_name=job, nested=True)
                self._runs[job] = run.info.run_id
                self._mlflow.end_run()
        elif isinstance(event, StepDone | Evaluated):
            for name, value in scalars(event).items():
                client().log_metric(self._runs[event.job], name, value, step=event.step)
        elif isinstance(event, JobEnded):
            client().set_tag(self._runs[event.job], "state", event.state.value)
            client().set_terminated(self._runs[event.job])


def gather(events: Iterable[Event]) -> dict[str, defaultdict[str, Points]]:
    """Returns the curves of every job by their names, without values that are not finite."""
    jobs: dict[str, defaultdict[str, Points]] = {}
    for event in events:
        if isinstance(event, StepDone | Evaluated):
            curves = jobs.setdefault(event.job, defaultdict(list))
            for name, value in scalars(event).items():
                if math.isfinite(value):
                    curves[name].append((event.step, value))
    return jobs


def draw(events: Iterable[Event], out: Path) -> None:
    """Draws loss, metric and learning rate of all jobs. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    jobs = gather(events)
    if not jobs:
        return
    has_metric = any("eval/metric" in curves for curves in jobs.values())
    figure = Figure(figsize=(12 if has_metric else 9, 4), layout="constrained")
    axes = list(figure.subplots(1, 3 if has_metric else 2))
    for i, (name, curves) in enumerate(jobs.items()):
        named = {"color": f"C{i % 10}", "label": name}
        dots = {**named, "marker": "o", "markersize": 3}
        axes[0].plot(*_xy(curves["train/loss"]), color=named["color"], alpha=0.35, linewidth=1)
        axes[0].plot(*_xy(curves["eval/loss"]), **dots)
        axes[1].plot(*_xy(curves["train/rate"]), **named)
        if has_metric:
            axes[2].plot(*_xy(curves["eval/metric"]), **dots)
    axes[0].set(title="loss (thin: train, dots: eval)", xlabel="step", ylabel="nats per token")
    axes[0].set_yscale("log")
    axes[1].set(title="learning rate", xlabel="step")
    if has_metric:
        axes[2].set(title="correct answers", xlabel="step", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.grid(alpha=0.3)
    if len(jobs) <= 10:
        axes[0].legend()
    fresh = out.with_name(f".{out.name}.new")
    figure.savefig(fresh, dpi=120, format="png")
    fresh.replace(out)


def _xy(points: Points) -> tuple[list[int], list[float]]:
    """Splits points into their steps and their values."""
    return [step for step, _ in points], [value for _, value in points]
