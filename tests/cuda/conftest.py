"""Tests of the Triton kernels in Triton's interpreter; `make test-triton` runs them."""

from __future__ import annotations

import os
from importlib.util import find_spec

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None

# Modules that import kernels can be collected only where Triton is installed.
collect_ignore_glob = [] if IS_INTERPRETED else ["test_*_kernels.py", "test_*_decoder.py"]
