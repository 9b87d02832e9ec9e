"""A change of the store may fail at any point: acknowledged changes are never lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex_model.base import faults

from adapters import store_workload as workload

POINTS = sorted(set(workload.points()))

KILLS = Path(__file__).with_name("store_kills.py")


@pytest.fixture(scope="module")
def ram() -> Iterator[Path]:
    """A folder in memory if possible; writes of a killed process are not lost there."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def prepared(ram: Path) -> Path:
    workload.prepare(ram / "raise")
    return ram / "raise"


class Injected(Exception):
    """The exception that a fault point raises."""


def test_every_point_has_one_place(prepared: Path, tmp_path: Path) -> None:
    assert len(POINTS) == len(workload.points())
    reached: set[str] = set()
    shutil.copytree(prepared / "template", tmp_path / "run")
    with faults.injected(reached.add):
        workload.live(tmp_path / "run", prepared, lambda step: None)
    assert reached == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_an_exception_at_a_point_loses_nothing(point: str, prepared: Path, ram: Path) -> None:
    with tempfile.TemporaryDirectory(dir=ram) as folder:
        root = Path(folder) / "run"
        for last in (1, 3):  # the first time that it is reached, and a later one
            shutil.copytree(prepared / "template", root)
            acknowledged: set[str] = set()
            hits = 0

            def fail(reached: str, last: int = last) -> None:
                nonlocal hits
                hits += reached == point
                if reached == point and hits == last:
                    raise Injected(point)

            try:
                with faults.injected(fail):
                    workload.live(root, prepared, acknowledged.add)
            except Injected:
                pass
            else:
                assert hits < last
            workload.check(root, prepared, acknowledged)
            shutil.rmtree(root)


@pytest.mark.parametrize(
    "wanted",
    [
        len(POINTS),
        pytest.param(200, marks=[pytest.mark.slow, pytest.mark.fault("kills-and-fuzz-not-run")]),
    ],
    ids=["each", "200"],
)
def test_kill_9_at_every_point_loses_nothing(wanted: int, ram: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(KILLS), str(ram / f"kill-{wanted}"), str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    outcome = json.loads(ran.stdout)
    assert outcome["kills"] == wanted
    assert outcome["points"] == POINTS


def test_without_an_action_a_point_does_nothing() -> None:
    seen: list[str] = []
    with faults.injected(seen.append):
        faults.reach("one")
    faults.reach("two")
    assert seen == ["one"]
