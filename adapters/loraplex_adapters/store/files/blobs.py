"""Adapters by content: one read-only directory per digest, which is complete or absent.

    <store>/lock                            held while a store is opened
    <store>/staging/<session>/<n>/          copies in progress; a session is one open store
    <store>/blobs/sha256/<hex>/             adapter_config.json, adapter_model.safetensors
    <store>/trash/<hex>.<n>/                collected blobs, to be removed

A blob is written and checked in staging, flushed to disk, and renamed into place; the rename is
flushed before it is reported. So a crash leaves a complete blob, or a partial copy in staging. The
next store that opens removes such copies: the lock of a dead session is free, that of a live one
is not. Removal takes the reverse way: a blob is first renamed into the trash and then removed.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from loraplex_model.base.durable import flush, flush_file, lock, make_directory
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import AdapterDigest, digest_hex, is_digest
from loraplex_adapters.format.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Directory,
    RegularFile,
    open_directory,
)
from loraplex_adapters.store.disk import disk_errors, unavailable

_BLOBS = Path("blobs", "sha256")
_PIECE = 1 << 20
_NO_LIMIT = 1 << 62
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

Seen: TypeAlias = tuple[int, int, int]
"""Which directory was in a blob's place: device, inode and time of change (nanoseconds)."""


class Blobs:
    """The blobs of one store, and this process's staging area. Safe to use from several threads.

    Must be opened under the store's lock, so that any session whose owner file is unlocked is dead.
    """

    def __init__(self, root: Path) -> None:
        with disk_errors():
            self._blobs = root / _BLOBS
            self._trash = root / "trash"
            reach("store.open.make")
            staging = root / "staging"
            for folder in (self._blobs, self._trash, staging):
                make_directory(folder)
            reach("store.open.clear")
            _clear_dead_sessions(staging)
            self._session = staging / uuid.uuid4().hex
            reach("store.open.session")
            self._session.mkdir()
            self._owner: int | None = lock(self._session / "owner", wait=False)

    @contextmanager
    def staged(self, source: Directory, max_weights_bytes: int) -> Iterator[Path]:
        """A durable copy of the adapter's two files, removed at the end unless it was published.

        Raises Refusal: STORE_FULL, STORE_UNAVAILABLE, and as `Directory.open` does.
        """
        copy = self._session / uuid.uuid4().hex
        try:
            with disk_errors():
                reach("store.stage.make")
                copy.mkdir()
            for name, limit in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_weights_bytes)):
                with source.open(name, limit) as file:
                    _copy(file, copy / name)
            with disk_errors():
                reach("store.stage.sync-directory")
                flush(copy)
            yield copy
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def damaged(self, digest: str) -> Seen | None:
        """Which directory is the blob of this digest, if its bytes are wrong; reads all of it.

        None if the blob is right or if there is none. Raises Refusal(STORE_UNAVAILABLE).
        """
        seen = _seen(self._blobs / digest_hex(digest))
        try:
            if seen is not None:
                self.verify(digest)
        except Refusal as error:
            if error.reason is Reason.STORE_UNAVAILABLE:
                raise
            return seen
        return None

    def place(self, copy: Path, digest: str, damaged: Seen | None) -> bool:
        """Makes a staged copy the blob of its digest; False if the blob that is there was kept.

        Only the directory that was `damaged` is replaced: any other has come since, by a
        registration that checked it, and others may be reading it. Must be called within a change
        of the index, so that nobody else places or collects blobs meanwhile.
        """
        place = self._blobs / digest_hex(digest)
        with disk_errors():
            if place.is_dir() and (damaged is None or _seen(place) != damaged):
                flush(self._blobs)  # the process that renamed it may not have flushed yet
                return False
            if not self._take_place(copy, place):
                # The blob is damaged or partly deleted by hand. The copy has just been checked, so
                # it takes the blob's place. A crash between the two renames leaves no blob;
                # registering the adapter again stores one.
                reach("store.publish.displace")
                moved = self._session / uuid.uuid4().hex
                _move_if_there(place, moved)
                _remove(moved)
                if not self._take_place(copy, place):
                    raise unavailable(f"{digest} cannot be added to the adapter store")
        return True

    def path(self, digest: str) -> Path:
        """Returns the blob's directory. Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        place = self._blobs / digest_hex(digest)
        if not place.is_dir():
            raise Refusal(Reason.ADAPTER_NOT_FOUND, f"there is no adapter {digest}", digest)
        return place

    def has(self, digest: str) -> bool:
        """Whether there is a blob of this digest, which must be well formed."""
        return (self._blobs / digest_hex(digest)).is_dir()

    def directory(self, digest: str) -> Path:
        """Returns where the blob is, or would be. Raises Refusal(FIELD_INVALID)."""
        return self._blobs / digest_hex(digest)

    def is_complete(self, digest: str) -> bool:
        """Whether both files of the blob are there and not empty; they are not read."""
        return is_complete(self.directory(digest))

    def ages(self, now: float) -> dict[str, float]:
        """Maps the digest of every blob to its age in seconds."""
        ages = {}
        with disk_errors():
            for place in self._blobs.iterdir():
                digest = f"sha256:{place.name}"
                try:
                    if is_digest(digest):
                        ages[digest] = now - place.lstat().st_mtime
                except FileNotFoundError:
                    continue  # collected meanwhile
        return ages

    def size(self, digest: str) -> int:
        """Size of the blob's files in bytes; 0 if there is no blob."""
        try:
            place = self._blobs / digest_hex(digest)
            return sum(file.stat().st_size for file in place.iterdir())
        except OSError:
            return 0

    def check(self, digest: str) -> None:
        """Verifies a blob that a version names, so that a missing one is ADAPTER_CORRUPT too."""
        try:
            self.verify(digest)
        except Refusal as error:
            if error.reason is not Reason.ADAPTER_NOT_FOUND:
                raise
            raise _corrupt(digest, "its files are missing") from None

    def verify(self, digest: str) -> None:
        """Reads the blob and compares its digest.

        Raises Refusal: ADAPTER_CORRUPT, STORE_UNAVAILABLE (no file descriptor is free), as `path`.
        """
        place = self.path(digest)
        try:
            with open_directory(place) as directory:
                config = directory.read_config()
                with directory.open(WEIGHTS_FILE, _NO_LIMIT) as file:
                    actual = AdapterDigest(config, file.size)
                    for piece in _pieces(file):
                        actual.update(piece)
        except Refusal as error:
            if error.reason is Reason.STORE_UNAVAILABLE:  # nothing is known about the files
                raise
            raise _corrupt(digest, error.message) from None
        if actual.text() != digest:
            raise _corrupt(digest, "its content has changed")

    def discard(self, digest: str) -> Path | None:
        """Moves a blob that no version names to the trash; returns its place there.

        Returns None if there is no blob.
        """
        hex_digits = digest_hex(digest)
        discarded = self._trash / f"{hex_digits}.{uuid.uuid4().hex}"
        with disk_errors():
            reach("store.discard.rename")
            if not _move_if_there(self._blobs / hex_digits, discarded):
                return None
            reach("store.discard.sync")
            for changed in (self._blobs, self._trash):
                flush(changed)
        return discarded

    def discarded(self) -> Iterator[tuple[str, Path]]:
        """The digests and directories of the blobs in the trash."""
        with disk_errors():
            directories = list(self._trash.iterdir())
        for directory in directories:
            digest = f"sha256:{directory.name.partition('.')[0]}"
            if is_digest(digest):
                yield digest, directory

    def take_back(self, digest: str, discarded: Path) -> None:
        """Moves a blob back from the trash."""
        with disk_errors():
            reach("store.discard.take-back")
            if _move_if_there(discarded, self._blobs / digest_hex(digest)):
                flush(self._blobs)

    def remove(self, discarded: Path) -> None:
        """Removes a blob in the trash."""
        reach("store.discard.remove")
        _remove(discarded)
        reach("store.discard.removed")

    def close(self) -> None:
        """Removes this process's staging area. Idempotent."""
        if self._owner is not None:
            shutil.rmtree(self._session, ignore_errors=True)
            os.close(self._owner)
            self._owner = None

    def _take_place(self, copy: Path, place: Path) -> bool:
        reach("store.publish.rename")
        try:
            copy.rename(place)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        reach("store.publish.sync")
        flush(self._blobs)
        reach("store.publish.done")
        return True


def blob_at(root: Path, digest: str) -> Path:
    """Where the store in `root` keeps the blob of this digest, which must be well formed."""
    return root / _BLOBS / digest_hex(digest)


def is_complete(place: Path) -> bool:
    """Whether `place` is a directory with both files of an adapter, neither of them empty."""
    try:
        return stat.S_ISDIR(place.lstat().st_mode) and all(
            stat.S_ISREG(found.st_mode) and found.st_size
            for found in ((place / name).lstat() for name in (CONFIG_FILE, WEIGHTS_FILE))
        )
    except OSError:
        return False


def _seen(place: Path) -> Seen | None:
    try:
        found = place.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _remove(path: Path) -> None:
    """Removes a directory, or what somebody has put in its place, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _move_if_there(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except FileNotFoundError:
        return False
    return True


def _copy(source: RegularFile, target: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with disk_errors():
        descriptor = os.open(target, flags, 0o444)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in _pieces(source):
            with disk_errors():
                reach("store.stage.write")
                while piece:
                    piece = piece[file.write(piece) :]
        with disk_errors():
            reach("store.stage.sync")
            flush_file(file)


def _pieces(file: RegularFile) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE, file.size)))
    for start in range(0, file.size, _PIECE):
        piece = buffer[: min(_PIECE, file.size - start)]
        file.read_into(piece, start)
        yield piece


def _clear_dead_sessions(staging: Path) -> None:
    """Removes the staging areas of dead sessions. The caller holds the store's lock."""
    for session in staging.iterdir():
        try:
            owner = lock(session / "owner", wait=False)
        except BlockingIOError:
            continue
        except OSError:
            owner = None  # its process died between creating the area and locking it
        shutil.rmtree(session, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def _corrupt(digest: str, why: str) -> Refusal:
    return Refusal(Reason.ADAPTER_CORRUPT, f"the stored adapter {digest} is damaged: {why}", digest)
