"""Adapters by content: one read-only directory per digest, complete or not there at all.

    <store>/lock                            taken while a store is opened
    <store>/staging/<session>/<n>/          copies in the making; a session is one open store
    <store>/blobs/sha256/<hex>/             adapter_config.json, adapter_model.safetensors

A blob is written and checked in staging, flushed to the disk, and renamed into place; the rename is
flushed too before anybody hears of it. So a crash leaves a whole blob or rubbish in staging, which
the next store to open clears: the dead session's lock is free then, and a living one's is not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_adapters.digest import AdapterDigest, digest_hex
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Directory,
    RegularFile,
    open_directory,
)

_PIECE = 1 << 20
_NO_LIMIT = 1 << 62
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)


class Blobs:
    """The blobs of one store, and this process's staging area. Safe to use from several threads.

    Opened under the store's `locked`: a session without a locked owner is a dead one.
    """

    def __init__(self, root: Path) -> None:
        with disk_errors():
            self._blobs = root / "blobs" / "sha256"
            self._blobs.mkdir(parents=True, exist_ok=True)
            for made in (root, root / "blobs", self._blobs):
                flush(made)
            staging = root / "staging"
            staging.mkdir(exist_ok=True)
            _clear_dead_sessions(staging)
            self._session = staging / uuid.uuid4().hex
            self._session.mkdir()
            self._owner: int | None = _lock(self._session / "owner")

    @contextmanager
    def staged(self, source: Directory, max_weights_bytes: int) -> Iterator[Path]:
        """A copy of the adapter's two files, on the disk for good; gone afterwards if still there.

        Raises AdapterError: what `Directory.open` raises, STORE_FULL, STORE_UNAVAILABLE.
        """
        copy = self._session / uuid.uuid4().hex
        try:
            with disk_errors():
                copy.mkdir()
            for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_weights_bytes)):
                with source.open(name, limit) as file:
                    _copy(file, copy / name)
            with disk_errors():
                flush(copy)
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def publish(self, copy: Path, digest: str) -> None:
        """Makes a staged copy with this digest the blob, unless there is a sound one already."""
        place = self._blobs / digest_hex(digest)
        with disk_errors():
            if self._rename(copy, place):
                return
            try:
                self.verify(digest)
                flush(self._blobs)  # whoever renamed it may not have come to that yet
            except AdapterError:
                # Damaged, or half deleted by hand: these bytes have just been checked, so they are
                # better. A crash between the renames leaves no blob, which registering again mends.
                self._rename(place, self._session / uuid.uuid4().hex)
                self._rename(copy, place)

    def path(self, digest: str) -> Path:
        """The blob's directory. Raises AdapterError: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        place = self._blobs / digest_hex(digest)
        if not place.is_dir():
            raise AdapterError("ADAPTER_NOT_FOUND", f"no adapter {digest} is stored", digest)
        return place

    def verify(self, digest: str) -> None:
        """Reads the blob; raises AdapterError: ADAPTER_CORRUPT, ADAPTER_NOT_FOUND."""
        place = self.path(digest)
        try:
            with open_directory(place) as directory:
                with directory.open_config() as file:
                    config = file.read(0, file.size)
                with directory.open(WEIGHTS_FILE, _NO_LIMIT) as file:
                    actual = AdapterDigest(config, file.size)
                    for piece in _pieces(file):
                        actual.update(piece)
        except AdapterError as error:
            raise _corrupt(digest, error.message) from None
        if actual.text() != digest:
            raise _corrupt(digest, "its bytes have changed")

    def close(self) -> None:
        """Gives up the staging area. Idempotent."""
        if self._owner is not None:
            shutil.rmtree(self._session, ignore_errors=True)
            os.close(self._owner)
            self._owner = None

    def _rename(self, source: Path, target: Path) -> bool:
        try:
            source.rename(target)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        flush(self._blobs)
        return True


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns what the operating system says about the store's disk into AdapterError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise AdapterError("STORE_FULL", "the adapter store's disk is full") from error
        raise AdapterError("STORE_UNAVAILABLE", "the adapter store cannot be written") from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the store's own lock, making the store's directory if there is none."""
    with disk_errors():
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush(directory: Path) -> None:
    """Brings a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: RegularFile, target: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with disk_errors():
        descriptor = os.open(target, flags, 0o444)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in _pieces(source):
            with disk_errors():
                while piece:
                    piece = piece[file.write(piece) :]
        with disk_errors():
            os.fsync(descriptor)


def _pieces(file: RegularFile) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE, file.size)))
    for start in range(0, file.size, _PIECE):
        piece = buffer[: min(_PIECE, file.size - start)]
        file.read_into(piece, start)
        yield piece


def _clear_dead_sessions(staging: Path) -> None:
    """Removes the staging areas whose owners are gone; the store's lock is held."""
    for session in staging.iterdir():
        try:
            owner = _lock(session / "owner")
        except BlockingIOError:
            continue
        except OSError:
            owner = None  # died between making the area and locking it
        shutil.rmtree(session, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def _lock(path: Path) -> int:
    """Takes a file's lock and returns its descriptor; raises BlockingIOError if it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _corrupt(digest: str, why: str) -> AdapterError:
    return AdapterError("ADAPTER_CORRUPT", f"the stored adapter {digest} is damaged: {why}", digest)
