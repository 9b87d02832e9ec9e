"""An engine over the oracle that notes whether its process can write a core dump."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from engine import oracle

PR_GET_DUMPABLE = 3


def is_dumpable() -> bool:
    """Whether the system may write an image of this process."""
    return ctypes.CDLL(None).prctl(PR_GET_DUMPABLE) != 0


def build(note: str, **options: Any) -> Any:
    """The oracle; the file `note` gets the answer."""
    Path(note).write_text(str(is_dumpable()))
    return oracle.build(**options)
