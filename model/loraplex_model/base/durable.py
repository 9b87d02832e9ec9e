"""Files that survive a crash: flushing to disk, writing a file whole or not at all, lock files.

Every function lets OSError through; callers turn it into their own reasons.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_shortage(error: BaseException | None) -> bool:
    """Whether this process lacks descriptors or memory, which says nothing about a file."""
    lacks = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return isinstance(error, OSError) and error.errno in lacks


def flush(path: Path) -> None:
    """Brings a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_file(file: IO[bytes]) -> None:
    """Brings everything that was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Makes a directory and its missing parents, whose names are on the disk on return.

    `mode` of the directory, not of its parents, is subject to the umask. The name of a directory
    that exists is flushed too, since the process that made it may have ended before its own flush.
    """
    missing = not path.is_dir()
    if missing and not path.parent.is_dir():
        make_directory(path.parent)
    try:
        path.mkdir(mode, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    if missing:
        flush(path.parent)
    else:
        with suppress(PermissionError):  # the folder above may belong to somebody else
            flush(path.parent)


def read_regular(path: Path) -> bytes:
    """Content of a regular file. Raises OSError for anything else; a FIFO does not block."""
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a file that after a crash has its old content or `data`, and nothing else.

    `mode` is subject to the umask. The new directory entry is not flushed: see `flush`.
    """
    fresh = path.parent / f".writing-{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(fresh, flags, mode), "wb") as file:
            file.write(data)
            flush_file(file)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def lock(path: Path, *, wait: bool = True, mode: int = 0o644) -> int:
    """Takes the exclusive lock of a file, which is made if it is missing.

    Returns a descriptor that holds the lock until it is closed or the process ends. Without `wait`
    raises BlockingIOError if the lock is taken.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(path: Path, mode: int = 0o644) -> Iterator[None]:
    """Holds the exclusive lock of a file, which is made if it is missing."""
    descriptor = lock(path, mode=mode)
    try:
        yield
    finally:
        os.close(descriptor)
