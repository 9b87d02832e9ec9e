"""The benchmarks are scripts beside the packages: their folder is not on the path by itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))
