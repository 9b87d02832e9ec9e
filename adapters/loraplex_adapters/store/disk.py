"""Locks of the store's folders, and typed errors of its disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.durable import is_disk_full, lock, make_directory
from loraplex_model.base.refusal import Reason, Refusal


def full() -> Refusal:
    """The refusal of a change for which the store's disk has no room."""
    return Refusal(Reason.STORE_FULL, "the adapter store's disk is full")


def unavailable(message: str) -> Refusal:
    """The refusal of a store that cannot be read or written."""
    return Refusal(Reason.STORE_UNAVAILABLE, message)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns OSError into Refusal: STORE_FULL if the disk is full, else STORE_UNAVAILABLE."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise full() from error
        raise unavailable("the adapter store cannot be written") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of the store; creates the folder if it is missing."""
    with disk_errors():
        make_directory(folder)
        descriptor = lock(folder / "lock")
    try:
        yield
    finally:
        os.close(descriptor)
