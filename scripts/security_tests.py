#!/usr/bin/env python3
"""Calls every method of a server with every kind of credential: make test-security

    python scripts/security_tests.py [PYTEST ARGUMENTS]

Runs tests/security/test_every_method.py. The last line of output is one JSON object: the numbers of
methods and roles, of combinations of a method, a credential and an address that were tried
(`combinations`), and of those in which the server decided otherwise than its table of roles says
(`wrong`). Exit code 1 if there was one, or if a test failed.
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
MODULE = "tests/security/test_every_method.py"
FIGURES = ("methods", "roles", "combinations", "wrong")


def run(arguments: Sequence[str]) -> tuple[dict[str, int], bool]:
    """Runs the tests; returns what they counted, and whether all have passed."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-rs", f"--junitxml={report}", MODULE]
        passed = subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode == 0
        properties = {
            item.get("name", ""): item.get("value", "")
            for item in ET.parse(report).iter("property")  # noqa: S314 - written by our own pytest
        }
    return {name: int(properties.get(name, 0)) for name in FIGURES}, passed


def main() -> int:
    """The command line; returns the exit code."""
    figures, passed = run(sys.argv[1:])
    print(json.dumps(figures))
    return int(not passed or not figures["combinations"] or figures["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
