"""Core dumps: images of a process's memory on the disk, in which prompts and keys would be."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

CORE_DUMPS_VARIABLE: Final = "LORAPLEX_CORE_DUMPS"
"""Variable that allows core dumps of the trainer; of the server it is the setting core_dumps."""

_ALLOWING: Final = frozenset({"1", "true", "t", "yes", "y", "on"})
_PR_SET_DUMPABLE: Final = 4

log = logging.getLogger(__name__)


def forbid_core_dumps() -> None:
    """Keeps the system from writing this process's memory to the disk if the process crashes.

    On Linux this also keeps other processes of the same user from reading its memory; root still
    can. Children may not write core dumps either; they can be read unless they call this, too.
    """
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        system = ctypes.CDLL(None, use_errno=True)
        if system.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            reason = os.strerror(ctypes.get_errno())
            log.warning("other processes of this user can read the memory: %s", reason)


def allowed(variables: Mapping[str, str]) -> bool:
    """Whether the environment allows core dumps."""
    return variables.get(CORE_DUMPS_VARIABLE, "").strip().lower() in _ALLOWING
