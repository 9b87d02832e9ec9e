#!/usr/bin/env python3
"""Compares every family of base models with transformers: make test-families

    python scripts/family_tests.py [--real] [PYTEST ARGUMENTS]

Runs the tests of tests/families, most of which `make test` leaves out: the logits of every family
from safetensors, from NF4 and from GGUF files, adapters and training on them, the answers of real
servers on some of them, and the options of PEFT's kinds that fold into factors. Then it
prints which kinds of adapters tests/families/test_adapters.py tries on which bases. With `--real`
only a published checkpoint is compared, which pip fetches (253 MB, once).

The last line of output is one JSON object: the number of architectures (`families`), the largest
difference of a logit (`max_logit_difference`), and the number of tests that failed or did not run
(`wrong`). Exit code 1 if a test is wrong or a difference is above the limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

NEAR = 1e-4
"""Largest difference of a logit; of a published checkpoint's, for each unit of their size."""

_REAL = "tests/families/test_real_checkpoint.py"
_OPTIONS = ("tests/adapters/test_folded_options.py", "tests/adapters/test_served_options.py")
TESTS = ("tests/families", f"--ignore={_REAL}", *_OPTIONS)
REAL = ("--real", _REAL)


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the tests; returns the figures of the last line."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-rs", "--slow", f"--junitxml={report}"]
        options = ["-o", "junit_family=xunit1"]  # the default has no place for properties
        subprocess.run([*command, *options, *arguments], cwd=ROOT, check=False)
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 - written by our own pytest
    wrong = [
        case
        for case in cases
        if any(case.find(mark) is not None for mark in ("failure", "error", "skipped"))
    ]
    differences = [float(value) for value in properties(cases, "difference")]
    return {
        "families": len({*properties(cases, "family")}),
        "max_logit_difference": max(differences, default=None),
        "wrong": len(wrong),
    }


def properties(cases: Sequence[ET.Element], name: str) -> list[str]:
    """The values that tests recorded under a name."""
    found = [each for case in cases for each in case.iter("property") if each.get("name") == name]
    return [each.get("value", "") for each in found]


def matrix() -> str:
    """A table of the bases, a row each, and of the kinds of adapters that are tried on them."""
    sys.path[:0] = [str(ROOT / "tests")]
    from families import adapter_kinds, variants
    from transformers.utils import logging

    logging.set_verbosity_error()
    pairs, kinds = adapter_kinds.pairs(), [*adapter_kinds.KINDS]
    rows = list(dict.fromkeys(variant for variant, _ in pairs))
    width = max(map(len, rows))
    lines = ["kinds of adapters on bases, as tests/families/test_adapters.py tries them:"]
    lines += [f"{i:>3} {kind}" for i, kind in enumerate(kinds, 1)]
    lines.append(" " * width + "".join(f"{i:>3}" for i in range(1, len(kinds) + 1)))
    for row in rows:
        marks = "".join("  x" if (row, kind) in pairs else "  ." for kind in kinds)
        lines.append(f"{row:<{width}}{marks}")
    others = ", ".join(variant for variant in variants.VARIANTS if variant not in rows)
    lines.append(f"LoRA on attention and on experts (tests/families/test_experts.py): {others}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    is_real = "--real" in arguments
    rest = [each for each in arguments if each != "--real"]
    figures = run([*(REAL if is_real else TESTS), *rest])
    if not is_real:
        print(matrix())
    print(json.dumps(figures))
    difference = figures["max_logit_difference"]
    return int(figures["wrong"] > 0 or difference is None or difference > NEAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
