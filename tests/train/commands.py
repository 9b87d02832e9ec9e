"""`loraplex-train` on a tiny base, in this process or in one of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from loraplex import cli as client
from loraplex_training.cli import app
from loraplex_training.report.events import Event
from loraplex_training.report.lines import decode
from typer.testing import CliRunner, Result

from train import runs

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "var" / "cache" / "kernels"
"""The compiled kernels of this checkout."""


@dataclass(frozen=True)
class Place:
    """A folder with a tiny base and data."""

    top: Path

    @property
    def data(self) -> Path:
        return self.top / runs.DATA

    def flags(self, out: str | None, **changes: object) -> list[str]:
        """A quick run's flags; without `out` its folder is the usual one."""
        given: dict[str, object] = {
            "data": self.data,
            "name": "job",
            "model": self.top / runs.MODEL,
            "cache": self.top / runs.CACHE,
            "out": out and self.top / out,
            "device": "cpu",
            "threads": 1,
            "steps": 3,
            "batch_size": 2,
            "max_length": 64,
            "eval_fraction": 0.25,
            "set": "r=2",
        } | changes
        return [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]

    def run(self, out: str, *more: str, **changes: object) -> Result:
        return invoke("run", *self.flags(out, **changes), *more)


def make(top: Path) -> Place:
    """Writes both."""
    runs.write_base(top)
    runs.write_data(top / runs.DATA)
    return Place(top)


def invoke(*arguments: str) -> Result:
    """Runs a command here; what it raises, a test sees."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Runs a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex_training", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def server(settings: Mapping[str, object], log: Path) -> Any:
    """A server in a process of its own, as `bench/served.py` runs it; a context manager.

    That folder is not put on the path: its scripts are named as packages of these tests are.
    """
    spec = spec_from_file_location("served", ROOT / "bench" / "served.py")
    assert spec is not None
    assert spec.loader is not None
    served = module_from_spec(spec)
    spec.loader.exec_module(served)
    return served.Server(settings, log)


def is_known(command: str) -> bool:
    """Whether the client has this command and these options; it is not run."""
    name, *words = shlex.split(command)
    done = CliRunner().invoke(client.app, [*words, "--help"])
    return name == "loraplex" and done.exit_code == 0


def events(text: str) -> list[Event]:
    """Every line of it."""
    return [decode(line) for line in text.splitlines()]
