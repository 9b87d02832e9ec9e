#!/usr/bin/env python3
"""Tries templates, adapters and data of other programs on real servers: make test-field

    python scripts/field_tests.py [PYTEST ARGUMENTS]

Runs the tests in tests/field. The last line of output is one JSON object: the number of tests that
ran (`cases`), and of those that passed (`right`). Exit code 1 unless all did.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: Sequence[str]) -> dict[str, int]:
    """Runs the tests; returns the numbers of those that ran and of those that passed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-rs", "--field", f"--junitxml={report}"]
        subprocess.run([*command, "tests/field", *arguments], cwd=ROOT, check=False)
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 - written by our own pytest
    wrong = ("failure", "error", "skipped")
    right = [case for case in cases if all(case.find(mark) is None for mark in wrong)]
    return {"cases": len(cases), "right": len(right)}


def main() -> int:
    """The command line; returns the exit code."""
    figures = run(sys.argv[1:])
    print(json.dumps(figures))
    return int(not figures["cases"] or figures["right"] < figures["cases"])


if __name__ == "__main__":
    sys.exit(main())
