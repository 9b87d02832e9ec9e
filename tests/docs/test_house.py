"""Public class names are unique, and no code recovers structure from sentences (`make house`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_public_class_name_is_taken_twice_and_no_sentence_is_parsed() -> None:
    command = [sys.executable, ROOT / "scripts" / "house.py"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(shown.splitlines()[-1])
    assert figures["product_lines"] > 10_000, "the packages were not found"
    assert figures["doubled_class_names"] == 0, shown
    assert figures["regex_over_prose"] == 0, shown
