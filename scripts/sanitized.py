#!/usr/bin/env python3
"""Runs tests of the C++ kernels compiled with sanitizers: make test-sanitized

    python scripts/sanitized.py [PYTEST ARGUMENTS]

The kernels are compiled for every instruction set of this machine, or for LORAPLEX_ISA alone, and
the tests run with each. The sanitizers are those of addresses and of undefined behaviour: the first
access outside of an object, or undefined behaviour, ends a run with a report. Without arguments the
tests of the kernels run, and those of the decoder that call all of them together. Exit code 1 if a
run fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loraplex_model.ops import build

ROOT = Path(__file__).resolve().parents[1]

TESTS = (
    "tests/kernels",
    "tests/model/test_batch_invariance.py",
    "tests/model/test_changes.py",
    "tests/families/test_decoders.py",
    "tests/adapters/test_kinds_runner.py",
)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    libraries = [_library("libasan.so"), _library("libstdc++.so.6")]
    if not all(Path(library).is_absolute() for library in libraries):
        print("the compiler has no libasan.so; install g++ (Debian: apt-get install g++)")
        return 1
    asked = os.environ.get("LORAPLEX_ISA")
    failed = False
    for isa in [asked] if asked else build.supported_isas():
        with tempfile.TemporaryDirectory() as reports:
            report = f"{reports}/report"
            environment = {
                **os.environ,
                "LORAPLEX_ISA": isa,
                # Python is not linked to these, so they are loaded first. Python and torch free
                # little at their end, which is no leak of the kernels.
                "LD_PRELOAD": " ".join(libraries),
                "ASAN_OPTIONS": f"detect_leaks=0:log_path={report}",
                "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
            }
            command = [sys.executable, "-m", "pytest", "-q", "--sanitized"]
            command += arguments or [*TESTS, "-k", "not reference"]
            print(f"{isa}:", flush=True)
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
            failed |= done.returncode != 0
            for path in sorted(Path(reports).iterdir()):
                print(path.read_text(errors="replace"), flush=True)
    return int(failed)


def _library(name: str) -> str:
    """The path of a library of the compiler's; its bare name if there is none."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
