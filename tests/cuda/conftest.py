"""Tests of the Triton kernels in Triton's interpreter; `make test-triton` runs them."""

from __future__ import annotations

import sys
from pathlib import Path

from interpreter import IS_INTERPRETED

# Modules that import kernels can be collected only where Triton is installed.
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*_kernels.py", "test_*_decoder.py"]

# The counter of launches is a module of the benchmarks.
sys.path.append(str(Path(__file__).parents[2] / "bench"))
