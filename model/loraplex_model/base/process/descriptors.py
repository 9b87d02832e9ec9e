"""The limit of open files: sockets, pipes and files of the store share it."""

from __future__ import annotations

import contextlib
import resource
from typing import Final

MOST: Final = 1 << 20
"""Limit that is set if the hard limit is higher; some libraries allocate memory by the limit."""


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit of open files to the hard limit, as far as `MOST`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
