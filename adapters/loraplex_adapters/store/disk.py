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


_OF_A_STORE = ("lock", "store-id", "index.sqlite3", "blobs")


def require_store(root: Path) -> None:
    """Raises Refusal(STORE_UNAVAILABLE) if `root` is missing or is a directory without a store.

    For commands that only read or change what a store holds: to create one at a mistyped path
    would hide the mistake. Whether a store can be used is found when it is opened.
    """
    with disk_errors():
        missing = not os.path.lexists(root)
    if missing or (root.is_dir() and not any((root / name).exists() for name in _OF_A_STORE)):
        what = "there is no such directory" if missing else "the directory holds no adapter store"
        message = f"{root}: {what} (--store); a server or `store import` creates a store"
        raise unavailable(message)


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
    """Holds the lock of a folder of the store, which is made for its owner alone if missing."""
    with disk_errors():
        make_directory(folder, 0o700)
        descriptor = lock(folder / "lock")
    try:
        yield
    finally:
        os.close(descriptor)
