"""Adapters by content: one read-only directory per digest, complete or not there at all.

    <store>/lock                            taken while a store is opened
    <store>/staging/<session>/<n>/          copies in the making; a session is one open store
    <store>/blobs/sha256/<hex>/             adapter_config.json, adapter_model.safetensors
    <store>/trash/<hex>.<n>/                collected, to be removed

A blob is written and checked in staging, flushed to the disk, and renamed into place; the rename is
flushed too before anybody hears of it. So a crash leaves a whole blob or rubbish in staging, which
the next store to open clears: the dead session's lock is free then, and a living one's is not.
A blob goes the other way: it is renamed into the trash, whole, and only then removed.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_model.base.durable import flush, flush_file, lock
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import AdapterDigest, digest_hex
from loraplex_adapters.format.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Directory,
    RegularFile,
    open_directory,
)
from loraplex_adapters.store.disk import disk_errors

_PIECE = 1 << 20
_NO_LIMIT = 1 << 62
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_ATTEMPTS = 8


class Blobs:
    """The blobs of one store, and this process's staging area. Safe to use from several threads.

    Opened under the store's lock: a session without a locked owner is a dead one.
    """

    def __init__(self, root: Path) -> None:
        with disk_errors():
            self._blobs = root / "blobs" / "sha256"
            self._trash = root / "trash"
            reach("store.open.make")
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._trash.mkdir(exist_ok=True)
            for made in (root, root / "blobs", self._blobs):
                flush(made)
            staging = root / "staging"
            staging.mkdir(exist_ok=True)
            reach("store.open.clear")
            _clear_dead_sessions(staging)
            self._session = staging / uuid.uuid4().hex
            reach("store.open.session")
            self._session.mkdir()
            self._owner: int | None = lock(self._session / "owner", wait=False)

    @contextmanager
    def staged(self, source: Directory, max_weights_bytes: int) -> Iterator[Path]:
        """A copy of the adapter's two files, on the disk for good; gone afterwards if still there.

        Raises Refusal: what `Directory.open` raises, STORE_FULL, STORE_UNAVAILABLE.
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

    def publish(self, copy: Path, digest: str) -> None:
        """Makes a staged copy with this digest the blob, unless there is a sound one already."""
        place = self._blobs / digest_hex(digest)
        with disk_errors():
            for _ in range(_ATTEMPTS):
                if self._take_place(copy, place):
                    return
                try:
                    self.verify(digest)
                    flush(self._blobs)  # whoever renamed it may not have come to that yet
                    return
                except Refusal:
                    # Damaged, half deleted by hand, or collected meanwhile: these bytes have just
                    # been checked, so they are better. A crash between the renames leaves no blob,
                    # which registering again mends.
                    reach("store.publish.displace")
                    worse = self._session / uuid.uuid4().hex
                    _move_if_there(place, worse)
                    shutil.rmtree(worse, ignore_errors=True)
        raise Refusal(Reason.STORE_UNAVAILABLE, f"{digest} cannot be put into the adapter store")

    def path(self, digest: str) -> Path:
        """The blob's directory. Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        place = self._blobs / digest_hex(digest)
        if not place.is_dir():
            raise Refusal(Reason.ADAPTER_NOT_FOUND, f"no adapter {digest} is stored", digest)
        return place

    def has(self, digest: str) -> bool:
        """Whether there is a blob; `digest` is one."""
        return (self._blobs / digest_hex(digest)).is_dir()

    def ages(self, now: float) -> dict[str, float]:
        """Every blob, and the seconds since it was written."""
        ages = {}
        with disk_errors():
            for place in self._blobs.iterdir():
                digest = f"sha256:{place.name}"
                try:
                    if is_digest(digest):
                        ages[digest] = now - place.stat().st_mtime
                except FileNotFoundError:
                    continue  # collected meanwhile
        return ages

    def size(self, digest: str) -> int:
        """Bytes of the blob's files; 0 if there is none."""
        try:
            place = self._blobs / digest_hex(digest)
            return sum(file.stat().st_size for file in place.iterdir())
        except OSError:
            return 0

    def verify(self, digest: str) -> None:
        """Reads the blob; raises Refusal: ADAPTER_CORRUPT, ADAPTER_NOT_FOUND."""
        place = self.path(digest)
        try:
            with open_directory(place) as directory:
                with directory.open_config() as file:
                    config = file.read(0, file.size)
                with directory.open(WEIGHTS_FILE, _NO_LIMIT) as file:
                    actual = AdapterDigest(config, file.size)
                    for piece in _pieces(file):
                        actual.update(piece)
        except Refusal as error:
            raise _corrupt(digest, error.message) from None
        if actual.text() != digest:
            raise _corrupt(digest, "its bytes have changed")

    def discard(self, digest: str) -> Path | None:
        """Renames a blob into the trash; None if there is none. Nothing may name it now."""
        hex_digits = digest_hex(digest)
        thrown = self._trash / f"{hex_digits}.{uuid.uuid4().hex}"
        with disk_errors():
            reach("store.discard.rename")
            if not _move_if_there(self._blobs / hex_digits, thrown):
                return None
            reach("store.discard.sync")
            for changed in (self._blobs, self._trash):
                flush(changed)
        return thrown

    def discarded(self) -> Iterator[tuple[str, Path]]:
        """What lies in the trash: digests and their directories."""
        with disk_errors():
            thrown = list(self._trash.iterdir())
        for directory in thrown:
            digest = f"sha256:{directory.name.partition('.')[0]}"
            if is_digest(digest):
                yield digest, directory

    def take_back(self, digest: str, thrown: Path) -> None:
        """Makes a blob of what is in the trash."""
        with disk_errors():
            reach("store.discard.take-back")
            if _move_if_there(thrown, self._blobs / digest_hex(digest)):
                flush(self._blobs)

    def remove(self, thrown: Path) -> None:
        """Removes a directory of the trash for good."""
        reach("store.discard.remove")
        shutil.rmtree(thrown, ignore_errors=True)
        reach("store.discard.removed")

    def close(self) -> None:
        """Gives up the staging area. Idempotent."""
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


def is_digest(text: str) -> bool:
    """Whether `text` is "sha256:<64 hex digits>"."""
    try:
        digest_hex(text)
    except Refusal:
        return False
    return True


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
    """Removes the staging areas whose owners are gone; the store's lock is held."""
    for session in staging.iterdir():
        try:
            owner = lock(session / "owner", wait=False)
        except BlockingIOError:
            continue
        except OSError:
            owner = None  # died between making the area and locking it
        shutil.rmtree(session, ignore_errors=True)
        if owner is not None:
            os.close(owner)


def _corrupt(digest: str, why: str) -> Refusal:
    return Refusal(Reason.ADAPTER_CORRUPT, f"the stored adapter {digest} is damaged: {why}", digest)
