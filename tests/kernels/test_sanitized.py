"""The kernels do nothing undefined, and a read outside of an object would be noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_model.ops import build

pytestmark = [pytest.mark.slow, pytest.mark.fault("virtual-tokens-beyond-context")]

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/kernels/"
SMALL = (
    "bounds or unpack or elementwise or attention or norm or rotation or activation or caps"
    " or bfloat16 or token or line"
)
TESTED = [isa for isa in ("portable", "avx2") if isa in build.supported_isas()]


def sanitized(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make test-sanitized` with other tests."""
    done = subprocess.run(
        [sys.executable, "scripts/sanitized.py", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, "LORAPLEX_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "no libasan.so" in done.stdout:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("isa", TESTED)
def test_every_kernel_passes_its_tests_with_sanitizers(isa: str) -> None:
    """On small shapes; `make test-sanitized` runs all of them, and whole passes."""
    names = ("bounds", "unpack", "elementwise", "kernels", "rows")
    files = [HERE + f"test_{name}.py" for name in names]
    done = sanitized(isa, "-x", "-k", SMALL, *files)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_a_read_behind_the_end_is_reported() -> None:
    done = sanitized(TESTED[-1], HERE + "overrun.py")
    assert done.returncode == 1
    assert "heap-buffer-overflow" in done.stdout
    assert "rotate" in done.stdout
