"""Locks of the store's folders, and typed errors of its disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.durable import lock
from loraplex_model.base.refusal import Reason, Refusal

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns OSError into Refusal: STORE_FULL if the disk is full, else STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Refusal(Reason.STORE_FULL, "the adapter store's disk is full") from error
        raise Refusal(Reason.STORE_UNAVAILABLE, "the adapter store cannot be written") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of the store; creates the folder if it is missing."""
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = lock(folder / "lock")
    try:
        yield
    finally:
        os.close(descriptor)
