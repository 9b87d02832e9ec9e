#!/usr/bin/env python3
"""Checks everything in deploy/ that can be checked without a cluster: make check-deploy

    python scripts/check_deploy.py [PYTEST ARGUMENTS]

Renders every Kubernetes overlay and compares its objects with the schemas of Kubernetes, each other
and the code; does the same for the Dockerfile, the compose files, the units of systemd and what the
image installs; and restarts two servers on one store and one PostgreSQL one after the other while
clients call both. What could not be checked is listed. The last line of output is one JSON object:
the number of `overlays` that were rendered, of tests that failed (`invalid`), of `replicas`, and of
requests that the client library did not save (`lost_requests`, null if no replicas ran). Exit code
1 if a test failed or nothing was rendered, or if a request was lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    *("dockerfile", "orchestration", "custom_objects", "compose", "systemd", "ray", "fleet"),
    "supply_chain",
)
UNCHECKED = (
    "that the Dockerfile builds, and that its images start: no container engine",
    "that a cluster accepts the objects, schedules, probes and scales: no cluster",
    "that the operators of Prometheus and KEDA, cert-manager and the endpoint picker do their part",
    "that systemd starts the unit: its files are verified, not loaded",
    "anything on a GPU",
)


def run(arguments: Sequence[str]) -> list[ET.Element]:
    """Runs the tests; returns the test cases of their report."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        names = [f"tests/deploy/test_{name}.py" for name in FILES]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-rs",
            "--slow",
            f"--junitxml={report}",
            "-ojunit_family=xunit1",
            *names,
        ]
        subprocess.run([*command, *arguments], cwd=ROOT, check=False)
        return list(ET.parse(report).iter("testcase"))  # noqa: S314 - written by our own pytest


def figures(cases: Sequence[ET.Element]) -> dict[str, Any]:
    """The figures of a run, from its test cases."""
    noted = {
        item.get("name", ""): item.get("value", "")
        for case in cases
        for item in case.iter("property")
    }
    rendered = {
        case.get("name", "").partition("[")[2].rstrip("]")
        for case in cases
        if case.get("name", "").startswith("test_every_object_of_kubernetes_is_valid[")
        and case.find("skipped") is None
    }
    failed = [case for case in cases if any(case.find(m) is not None for m in ("failure", "error"))]
    lost = noted.get("lost_requests")
    return {
        "overlays": len(rendered),
        "invalid": len(failed),
        "replicas": int(noted.get("replicas", 0)),
        "lost_requests": None if lost is None else int(lost),
        "requests": int(noted.get("requests", 0)),
        "restarts": int(noted.get("restarts", 0)),
        "exposure": noted.get("exposure"),
    }


def main() -> int:
    """The command line; returns the exit code."""
    found = figures(run(sys.argv[1:]))
    missing = [name for name in ("kubectl", "systemd-analyze") if shutil.which(name) is None]
    print("\nNot checked:")
    for what in (*UNCHECKED, *(f"what needs {name}, which is not installed" for name in missing)):
        print(f"  - {what}")
    print(json.dumps(found))
    return int(not found["overlays"] or found["invalid"] > 0 or found["lost_requests"] != 0)


if __name__ == "__main__":
    sys.exit(main())
