"""A run's curves: TensorBoard reads them, the picture is one, MLflow is told if it is there."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loraplex_training.report import curves
from loraplex_training.report.curves import PICTURE, MLflow, Picture, TensorBoard, draw, gather
from loraplex_training.report.events import (
    Evaluated,
    Event,
    JobEnded,
    JobStatus,
    Observer,
    RunEnded,
    RunStarted,
    StepDone,
)
from loraplex_training.report.record import RunRecord
from msgspec.structs import replace

START = RunStarted(("a", "b"), (3, 3), 0, "cpu", 0, ("", ""))
STEP = StepDone("a", 1, 0.5, 1e-3, 2.0, 100, 10, 0.5)
END = RunEnded(1.0, 600, 1)
COURSE: tuple[Event, ...] = (
    START,
    *(
        replace(STEP, job=job, step=n, loss=1 / n + (job == "b"))
        for n in range(1, 4)
        for job in "ab"
    ),
    Evaluated("a", 3, 0.4, math.exp(0.4), 0.5, True),
    JobEnded("a", JobStatus.FINISHED, 3, ""),
    JobEnded("b", JobStatus.FINISHED, 3, ""),
    END,
)


def tell(observer: Observer, events: Iterable[Event]) -> None:
    for event in events:
        observer.on(event)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_reads_every_job_s_curves(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path), COURSE)
    a, b = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    assert [(step, 1 / step) for step in (1, 2, 3)] == a["train/loss"]
    assert [(step, 1 / step + 1) for step in (1, 2, 3)] == b["train/loss"]
    assert a["train/tokens_per_second"][0] == (1, 200.0)
    assert a["eval/metric"] == [(3, 0.5)]
    assert "eval/loss" not in b


def test_steps_that_are_taken_again_are_shown_once(tmp_path: Path) -> None:
    tell(TensorBoard(tmp_path), (START, *(replace(STEP, step=n) for n in (1, 2, 3)), END))
    time.sleep(1.1)  # files are read in the order of names, which hold the second and a counter
    again = (replace(START, step=1), *(replace(STEP, step=n, loss=9.0) for n in (2, 3)), END)
    tell(TensorBoard(tmp_path), again)
    assert scalars(tmp_path / "a")["train/loss"] == [(1, 0.5), (2, 9.0), (3, 9.0)]


def test_the_picture_is_drawn_from_the_record(tmp_path: Path) -> None:
    record, picture = RunRecord(tmp_path), Picture(tmp_path)
    for event in COURSE:
        record.on(event)
        assert not (tmp_path / PICTURE).exists()
        picture.on(event)
    content = (tmp_path / PICTURE).read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert not list(tmp_path.glob(".curves*"))


def test_points_are_those_of_the_events_and_finite() -> None:
    odd = replace(STEP, step=4, loss=math.inf)
    found = gather((*COURSE, odd))
    assert found["a"]["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found["a"]["eval/metric"] == [(3, 0.5)]
    assert "eval/loss" not in found["b"]


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    draw((START, END), tmp_path / PICTURE)
    assert not (tmp_path / PICTURE).exists()


@pytest.mark.parametrize("missing", ["matplotlib.figure", "torch.utils.tensorboard"])
def test_a_run_goes_on_without_a_library(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for observer in (RunRecord(tmp_path), TensorBoard(tmp_path / "board"), Picture(tmp_path)):
        tell(observer, COURSE)
    assert len(caplog.records) == 1


class FakeMLflow:
    """What of MLflow is used."""

    def __init__(self, failing: bool = False) -> None:
        self.metrics: list[tuple[str, str, float, int]] = []
        self.ended: list[str] = []
        self.failing = failing
        self.calls = 0

    def start_run(self, run_name: str, nested: bool) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{run_name}"))

    def end_run(self) -> None:
        pass

    def MlflowClient(self) -> FakeMLflow:
        return self

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.calls += 1
        if self.failing:
            raise RuntimeError("no such server")
        self.metrics.append((run, name, value, step))

    def set_tag(self, run: str, name: str, value: str) -> None:
        assert (name, value) == ("state", "finished")

    def set_terminated(self, run: str) -> None:
        self.ended.append(run)


def test_mlflow_is_told_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    tell(MLflow(), COURSE)
    assert ("run-b", "train/loss", 1.5, 2) in fake.metrics
    assert ("run-a", "eval/metric", 0.5, 3) in fake.metrics
    assert fake.ended == ["run-a", "run-b"]


def test_a_tracking_server_that_fails_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeMLflow(failing=True)
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    tell(MLflow(), COURSE)
    assert fake.calls == 1
    assert len(caplog.records) == 1


def test_without_mlflow_there_is_no_such_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    assert [type(w) for w in curves.writers(tmp_path)] == [TensorBoard, Picture]
