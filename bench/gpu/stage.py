"""What a stage of the check is, and the report that it writes while it runs."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report as output


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the check, which runs in a process of its own.

    Attributes:
        module: the module in this folder with its `run`.
        seconds: its share of the budget; what earlier stages left over is added.
    """

    name: str
    module: str
    seconds: float


STAGES = (
    Stage("S0", "ceilings", 20),
    Stage("S1", "compiled", 50),
    Stage("S2", "correct", 50),
    Stage("S3", "kernels", 60),
    Stage("S4", "decoder", 45),
    Stage("S5", "engine", 75),
    Stage("S6", "peer", 40),
    Stage("S7", "training", 20),
)
"""Correctness comes before speed: with a short budget the last stages are the ones that are cut."""


@dataclass
class StageReport:
    """Results of one stage, written to a file whenever one is added.

    Attributes:
        dry: the stage runs on a CPU, with tiny sizes, and measures nothing.
        device: where tensors are: "cuda", or "cpu" if dry.
        seconds: the stage is ended after this time.
        figures: what was measured, by name.
        checks: number of comparisons that were made.
        failed: what was wrong, one sentence each.
        notes: what a reader has to know, such as why a part did not run.
    """

    path: Path
    dry: bool
    device: str
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    checks: int = 0
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = time.monotonic()
        self._write(done=False)

    @property
    def left(self) -> float:
        """Seconds until the stage is ended."""
        return self.seconds - (time.monotonic() - self._begun)

    def check(self, is_right: bool, what: str) -> None:
        """Counts a comparison; `what` says what was compared, with the numbers."""
        self.checks += 1
        if not is_right:
            self.failed.append(what)
            print(f"    failed: {what}", flush=True)
        self._write(done=False)

    def figure(self, name: str, value: Any) -> None:
        """Adds a figure to the result."""
        self.figures[name] = value
        self._write(done=False)

    def other(self, name: str) -> dict[str, Any]:
        """The figures of an earlier stage of this run; empty if there are none."""
        figures: dict[str, Any] = read(self.path.with_name(f"{name}.json")).get("figures", {})
        return figures

    def note(self, text: str) -> None:
        """Adds a sentence to the result, and prints it."""
        self.notes.append(text)
        print(f"    {text}", flush=True)
        self._write(done=False)

    def table(self, head: list[str], rows: list[list[object]]) -> None:
        """Prints a table, indented."""
        for line in output.table(head, rows).splitlines():
            print(f"    {line}", flush=True)

    def run(self, stage: Callable[[StageReport], None]) -> bool:
        """Runs a stage; returns whether everything was right. An exception is a failure."""
        try:
            stage(self)
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{type(error).__name__}: {error}"[:500])
        self._write(done=True)
        return not self.failed

    def _write(self, *, done: bool) -> None:
        values = {
            "done": done,
            "checks": self.checks,
            "failed": self.failed,
            "notes": self.notes,
            "figures": self.figures,
        }
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(output.json_line(values), "utf-8")
        unfinished.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """What a stage wrote, also if it was ended; empty if it wrote nothing."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found
