"""The fuzzer of `make fuzz` runs, and finds nothing in a few seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import TARGETS

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 4


@pytest.mark.slow
@pytest.mark.fault("kills-and-fuzz-not-run")
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_no_input_that_breaks_a_promise(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, str(TESTS / "fuzz" / "run.py"), target, str(SECONDS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = [path.name for path in (tmp_path / "var" / "fuzz" / target).glob("*-*")]
    assert ran.returncode == 0, f"{found}\n{ran.stderr[-5000:]}"
    tried = re.search(r"stat::number_of_executed_units:\s+(\d+)", ran.stderr)
    assert tried is not None, ran.stderr[-5000:]
    assert int(tried[1]) > 20
