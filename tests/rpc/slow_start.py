"""An engine that takes for ever to load its model."""

from __future__ import annotations

import sys
import time


def build(**_: object) -> None:
    """Never returns."""
    print("building", file=sys.stderr, flush=True)
    time.sleep(3600)
