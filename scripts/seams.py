#!/usr/bin/env python3
"""Runs the tests of every known fault and counts the faults that stay fixed: make test-seams

    python scripts/seams.py [--ran REPORT] [PYTEST ARGUMENTS]

REPORT is the JUnit report of a run of all tests but the slow ones, as `make test` makes one with
PYTEST_ADDOPTS=--junitxml=REPORT; then only the slow ones are run here. The faults are the rows of
docs/faults.md; their tests carry the marker `fault`. A fault counts as fixed if it has a test that
ran, and none that failed. The tests of power cuts are then run again with fsync replaced by
nothing, where each of them has to fail. The last line of output is one JSON object. Exit code 1 if
a fault is not fixed, or if no test fails without fsync.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def known_faults() -> list[str]:
    """Names of the faults in docs/faults.md, in its order."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)


def run(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Runs pytest; returns the outcomes (passed, failed, skipped) of each fault's tests."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-rs", f"--junitxml={report}", *arguments]
        subprocess.run(command, cwd=ROOT, check=False)
        return outcomes(report)


def outcomes(report: Path) -> dict[str, list[str]]:
    """Outcomes of each fault's tests in a JUnit report."""
    found: dict[str, list[str]] = defaultdict(list)
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - written by our own pytest
        outcome = "passed"
        if case.find("skipped") is not None:
            outcome = "skipped"
        if case.find("failure") is not None or case.find("error") is not None:
            outcome = "failed"
        for item in case.iter("property"):
            if item.get("name") == "fault":
                found[item.get("value", "")].append(outcome)
    return found


def is_fixed(results: Sequence[str]) -> bool:
    """Whether a test ran and none failed."""
    return "passed" in results and "failed" not in results


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ran", type=Path, metavar="REPORT")
    options, arguments = parser.parse_known_args()
    marked = "fault" if options.ran is None else "fault and slow"
    results = run(["--slow", "-m", marked, *arguments])
    if options.ran is not None:
        for fault, found in outcomes(options.ran).items():
            results[fault] += found
    faults = known_faults()
    open_faults = [fault for fault in faults if not is_fixed(results[fault])]
    unsynced = run(["--fault", "power-cut", "--without-fsync"])["power-cut"].count("failed")
    for fault in open_faults:
        print(f"not fixed: {fault} ({', '.join(results[fault]) or 'no test'})")
    figures = {
        "faults": len(faults),
        "fixed": len(faults) - len(open_faults),
        "tests_that_fail_without_fsync": unsynced,
    }
    print(json.dumps(figures))
    return int(bool(open_faults) or not unsynced)


if __name__ == "__main__":
    sys.exit(main())
