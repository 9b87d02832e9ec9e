"""A run's events as lines of JSON: nothing is lost on the way, and what is no event is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from loraplex_model.base.refusal import Problem, Reason
from loraplex_training.report.events import (
    Evaluated,
    Event,
    Exported,
    Failed,
    JobEnded,
    JobStatus,
    Published,
    RunEnded,
    RunStarted,
    Sampled,
    Saved,
    StepDone,
)
from loraplex_training.report.lines import decode, encode
from loraplex_training.report.record import METRICS, RunRecord, environment, read
from msgspec.structs import replace

STEP = StepDone("a", 3, 0.25, 1e-4, 1.5, 120, 40, 0.5)
EVENTS: tuple[Event, ...] = (
    RunStarted(("a", "b"), (10, 20), 0, "cpu", 123, ("AdamW, float32", "none")),
    STEP,
    Evaluated("a", 3, 0.5, math.exp(0.5), 0.75, True),
    Evaluated("a", 4, 0.5, math.exp(0.5), None, False),
    Sampled("a", 0, 'a "prompt"\n', "ünïcode \u2028", ""),
    Exported("a", 4, Path("var/runs/a/a/step-000004")),
    JobEnded("a", JobStatus.STOPPED_EARLY, 9, "no better for 3 evaluations"),
    Saved(10, Path("var/runs/a/checkpoints/10")),
    Published("a", Path("x"), "sha256:0", "a@3", "localhost:1", "Hi"),
    RunEnded(12.5, 1000, 10**9),
    Failed(Reason.DATA_INVALID, (Problem("data", "a.jsonl:3: is empty"), Problem("", "no more"))),
)


def test_every_event_comes_back_from_its_line() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    for event in EVENTS:
        line = encode(event)
        assert "\n" not in line
        assert decode(line) == event
        assert json.loads(line)["event"] == type(event).__name__


@pytest.mark.parametrize(
    ("value", "word"), [(math.inf, "Infinity"), (-math.inf, "-Infinity"), (math.nan, "NaN")]
)
def test_numbers_that_json_lacks_are_told_as_words(value: float, word: str) -> None:
    line = encode(replace(STEP, loss=value))
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == word
    found = decode(line)
    assert isinstance(found, StepDone)
    assert found.loss == value or (math.isnan(value) and math.isnan(found.loss))


def test_a_reader_takes_fields_that_it_does_not_know_and_whole_numbers() -> None:
    data = {**json.loads(encode(STEP)), "later": [1], "loss": 1}
    assert decode(json.dumps(data)) == replace(STEP, loss=1.0)


@pytest.mark.parametrize(
    "line",
    ["", "[]", "3", "{}", '{"event": "Nothing"}', '{"event": ["StepDone"]}',
     '{"event": "StepDone"}',
     '{"event": "JobEnded", "job": "a", "state": "asleep", "step": 1, "reason": ""}',
     '{"event": "Saved", "step": "3", "path": "x"}'],
)  # fmt: skip
def test_what_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(line)


def test_readers_of_events_need_no_torch() -> None:
    code = "import loraplex_training.report.lines, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_s_record_holds_every_event(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run")
    for event in EVENTS:
        record.on(event)
    assert tuple(read(tmp_path / "run")) == EVENTS


def test_a_run_that_goes_on_forgets_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    first = RunRecord(tmp_path)
    start = RunStarted(("a",), (9,), 0, "cpu", 0, ("",))
    for event in (start, *(replace(STEP, step=n) for n in range(1, 6))):
        first.on(event)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"event": "StepDo')  # killed here
    second = RunRecord(tmp_path)
    for event in (replace(start, step=3), replace(STEP, step=4)):
        second.on(event)
    steps = [event.step for event in read(tmp_path) if isinstance(event, StepDone)]
    assert steps == [1, 2, 3, 4]


def test_a_disk_that_takes_nothing_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    record = RunRecord(tmp_path / "file")
    for event in EVENTS:
        record.on(event)
    assert len(caplog.records) == 1
    assert "no longer recorded" in caplog.text


def test_the_environment_names_no_machine() -> None:
    import platform

    text = json.dumps(environment("cpu"))
    assert "torch" in text
    assert platform.node() not in text
    assert str(Path.home()) not in text
