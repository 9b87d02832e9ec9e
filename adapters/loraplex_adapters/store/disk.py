"""What blobs, uploads and the store's id ask of the disk: locks, flushes, typed errors."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.refusal import Reason, Refusal

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns what the operating system says about the store's disk into Refusal."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Refusal(Reason.STORE_FULL, "the adapter store's disk is full") from error
        raise Refusal(Reason.STORE_UNAVAILABLE, "the adapter store cannot be written") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of the store, making the folder if there is none."""
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> int:
    """Takes a file's lock and returns its descriptor; raises BlockingIOError if it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def flush(directory: Path) -> None:
    """Brings a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
