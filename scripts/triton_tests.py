#!/usr/bin/env python3
"""Tests the Triton kernels and the decoder on CUDA in Triton's interpreter: make test-triton

    python scripts/triton_tests.py [PYTEST ARGUMENTS]

The interpreter executes kernels on tensors in host memory, so no GPU is needed. Without arguments
these run:

- tests/cuda: every kernel and the parts of the decoder, compared with float64;
- the suites of the other decoders, with the decoder on CUDA in the interpreter (`-k cuda`);
- bench/gpu_check.py --dry: every stage of the check that runs on a GPU, with tiny models.

Each test file is a process, and `LORAPLEX_TEST_PROCESSES` of them (default: 2) run side by side,
since the interpreter uses one core. The output of a process is printed when it ends. The last line
of output is one JSON object. Exit code 1 if a process fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SUITES = (
    "tests/model/test_changes.py",
    "tests/model/test_parity_hugging_face.py",
    "tests/model/test_parity_peft.py",
    "tests/model/test_batch_invariance.py",
    "tests/model/test_states.py",
)
"""Suites with a parameter for the decoder, one of which is `cuda`."""

NO_TESTS = 5
"""Exit code of pytest if it selected no test."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process: its name in the output, and its arguments for Python."""

    name: str
    arguments: tuple[str, ...]


def jobs(arguments: Sequence[str]) -> list[Job]:
    """The processes to run, those that take longest first."""
    pytest = ("-m", "pytest", "-q", "-rs")
    if arguments:
        return [Job("pytest", (*pytest, *arguments))]
    check = Job("bench/gpu_check.py --dry", ("bench/gpu_check.py", "--dry"))
    suites = [Job(f"{path} -k cuda", (*pytest, path, "-k", "cuda")) for path in SUITES]
    files = sorted((ROOT / "tests" / "cuda").glob("test_*.py"))
    own = [Job(name, (*pytest, name)) for name in (str(file.relative_to(ROOT)) for file in files)]
    return [check, *suites, *own]


def run(job: Job, cache: str) -> tuple[int, str, float]:
    """Runs a job; returns its exit code, its output and its duration in seconds."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": cache,
        "OMP_NUM_THREADS": "1",
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *job.arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, time.monotonic() - start


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    wanted = jobs(arguments)
    failed = []
    processes = int(os.environ.get("LORAPLEX_TEST_PROCESSES", "2"))
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(run, job, cache): job for job in wanted}
        for future in as_completed(running):
            code, output, seconds = future.result()
            name = running[future].name
            print(f"== {name}: {seconds:.0f} s\n{output}", flush=True)
            if code:
                failed.append(f"{name} (no test)" if code == NO_TESTS else name)
    print(json.dumps({"processes": len(wanted), "failed": sorted(failed)}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
