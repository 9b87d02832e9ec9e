"""What people see of a run, on a terminal and in a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
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
from loraplex_training.report.progress import ProgressDisplay, duration_text, size_text
from msgspec.structs import replace
from rich.console import Console

START = RunStarted(("a", "[b]"), (4, 8), 0, "cpu", 500_000_000, ("AdamW, float32, 1 MB", "SGD"))
STEP = StepDone("a", 1, 0.5, 1e-3, 2.0, 100, 10, 0.5)
COURSE: tuple[Event, ...] = (
    START,
    Sampled("a", 0, "one\ntwo", "[red]", "three"),
    *(replace(STEP, step=n, loss=1 / n) for n in range(1, 5)),
    replace(STEP, job="[b]", step=1),
    Evaluated("a", 4, 0.25, 1.284, 0.5, True),
    JobEnded("a", JobStatus.FINISHED, 4, "all 4 steps are done"),
    JobEnded("[b]", JobStatus.DIVERGED, 1, "the loss of step 2 is nan; lower lr"),
    Saved(4, Path("x")),
    RunEnded(65.0, 650, 600_000_000),
    Published("a", Path("out/a"), "sha256:1", "a@2", "localhost:1", "Hello [world]"),
)


def told(events: Iterable[Event], terminal: bool, every_s: float = 0.0) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, color_system=None)
    with closing(ProgressDisplay(console, every_s)) as progress:
        for event in events:
            progress.on(event)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_everything_that_happens_is_told(terminal: bool) -> None:
    said = told(COURSE, terminal)
    for words in (
        "2 jobs in one pass on cpu; expected peak memory: 500 MB",
        "a: 4 steps, AdamW, float32, 1 MB",
        "'one\\ntwo'",
        "'[red]'",
        "loss 0.250",
        "200 tok/s",
        "eval loss 0.2500, perplexity 1.28, correct 50.0%, the best so far",
        "[b]: diverged at step 1: the loss of step 2 is nan; lower lr",
        "1:05, 650 tokens, 10 tok/s, peak memory 600 MB (expected 500 MB, +20%)",
        "a: published as a@2 on localhost:1: out/a sha256:1",
        "the server answers: Hello [world]",
    ):
        assert words in said


def test_in_a_pipe_steps_are_told_now_and_then_and_the_last_one_always() -> None:
    often, seldom = told(COURSE, False), told(COURSE, False, every_s=1e9)
    assert often.count("a: step") == 4 + 1  # and the evaluation
    assert [n for n in range(1, 5) if f"a: step {n}/4" in seldom] == [1, 4]


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left() -> None:
    said = told((START, *(replace(STEP, step=n, seconds=30.0) for n in (1, 2))), False)
    assert "step 1/4" in said
    assert said.count("1:30 left") == said.count("1:00 left") == 1


def test_a_run_that_goes_on_says_where() -> None:
    assert "continuing after step 7" in told((replace(START, step=7),), False)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12 kB"), (5 * 10**8, "500 MB"),
                       (2_500_000_000, "2.50 GB")],
)  # fmt: skip
def test_sizes_are_in_the_unit_that_fits(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
