"""Uploads: an adapter's two files, received in pieces; they survive restarts of the server.

    <store>/uploads/lock                    held while an upload is begun
    <store>/uploads/<id>/lock               held while the upload is written, read or removed
    <store>/uploads/<id>/peer               address of the client that began it, if it is known
    <store>/uploads/<id>/owner              name of the caller that began it, if it is known
    <store>/uploads/<id>/adapter_config.json, adapter_model.safetensors
    <store>/uploads/<id>/received.json      their sizes: see `received`

A piece is acknowledged once it is on disk and its end is recorded. Bytes that a crash leaves beyond
that are removed when the upload is used again; the client sends them again.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loraplex_model.base.durable import flush, lock, make_directory, write_atomically
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    Directory,
    open_directory,
)
from loraplex_adapters.store.disk import disk_errors, locked
from loraplex_adapters.store.files.received import RECEIVED, cut_to_received, record_received

_ID = re.compile(r"\A[0-9a-f]{32}\Z")
_PEER = "peer"
_OWNER = "owner"
_BUSY_SECONDS = 5.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class UploadBounds:
    """Limits of uploads.

    Attributes:
        max_weights_bytes: size of one weights file.
        max_open: number of unfinished uploads.
        max_per_peer: number of unfinished uploads that one owner or, without one, one peer began.
        expire_seconds: time from the last piece to the removal of an unfinished upload.
        expire_empty_seconds: time from its begin to the removal of an upload without any bytes.
    """

    max_weights_bytes: int = 4 << 30
    max_open: int = 32
    max_per_peer: int = 8
    expire_seconds: float = 24 * 3600.0
    expire_empty_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Upload:
    """Progress of an upload: the size of each file, which is the offset of its next piece."""

    id: str
    config_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An unfinished upload as it is listed.

    Attributes:
        config_bytes, weights_bytes: size of each file so far.
        peer: address of the client that began it; "" if it is not known.
        owner: name of the caller that began it; "" if callers were not identified.
        changed: Unix time of the last piece, or of its begin.
        expires: Unix time after which it may be removed.
    """

    id: str
    config_bytes: int
    weights_bytes: int
    peer: str
    changed: float
    expires: float
    owner: str = ""


class Uploads:
    """The unfinished uploads of a store. Safe to use from several threads and processes.

    A method that is given an `owner` treats uploads that another one began as if they did not
    exist; None stands for anybody. Every method raises Refusal(STORE_FULL or STORE_UNAVAILABLE) if
    the disk fails.
    """

    def __init__(self, root: Path, bounds: UploadBounds) -> None:
        self._root = root / "uploads"
        self._bounds = bounds
        self._limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: bounds.max_weights_bytes}
        self._clock = time.time() - time.monotonic()
        with disk_errors():
            make_directory(self._root)

    def begin(self, peer: str = "", owner: str = "") -> str:
        """Begins an upload for a client at the address `peer`, "" if unknown; returns its id.

        Raises Refusal(OVERLOADED) if too many are open, in all or of this owner or peer.
        """
        with locked(self._root):
            self.expire()
            there = self.all()
            if owner:
                own = sum(upload.owner == owner for upload in there)
            else:
                own = sum(upload.peer == peer for upload in there) if peer else 0
            if own >= self._bounds.max_per_peer:
                message = f"{own} uploads of {owner or peer} are open; finish or abort some"
                raise Refusal(Reason.OVERLOADED, message)
            if len(there) >= self._bounds.max_open:
                raise Refusal(Reason.OVERLOADED, "too many uploads are open; finish or abort some")
            upload_id = uuid.uuid4().hex
            with disk_errors():
                reach("store.upload.make")
                (self._root / upload_id).mkdir()
                reach("store.upload.made")
                if peer:
                    write_atomically(self._root / upload_id / _PEER, peer.encode())
                if owner:
                    write_atomically(self._root / upload_id / _OWNER, owner.encode())
                record_received(self._root / upload_id, {})
                flush(self._root)
        return upload_id

    def append(
        self,
        upload_id: str,
        file: str,
        offset: int,
        data: bytes | memoryview,
        owner: str | None = None,
    ) -> int:
        """Appends `data` to "adapter_config.json" or "adapter_model.safetensors"; returns its size.

        `offset` must be the file's size before, so that a piece sent twice does no harm.
        Raises Refusal: UPLOAD_NOT_FOUND; UPLOAD_OFFSET (the message and `state` give the right
        offset); FIELD_INVALID (not a file of an adapter); ADAPTER_TOO_LARGE.
        """
        limit = self._limits.get(file)
        if limit is None:
            message = f"an upload has the files {CONFIG_FILE} and {WEIGHTS_FILE}"
            raise Refusal(Reason.FIELD_INVALID, message, "file")
        with self._held(upload_id, owner) as folder, disk_errors():
            sizes = cut_to_received(folder, tuple(self._limits))
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder / file, flags, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if offset != size:
                    message = f"{file} has {size} bytes; continue from there"
                    raise Refusal(Reason.UPLOAD_OFFSET, message, file)
                if size + len(data) > limit:
                    message = f"{file} may have at most {limit} bytes"
                    raise Refusal(Reason.ADAPTER_TOO_LARGE, message, file)
                rest = memoryview(data)
                while rest:
                    reach("store.upload.write")
                    written = os.pwrite(descriptor, rest, size)
                    rest, size = rest[written:], size + written
                reach("store.upload.sync")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            record_received(folder, sizes | {file: size})
        return size

    def state(self, upload_id: str, owner: str | None = None) -> Upload:
        """Returns the progress of an upload. Raises Refusal(UPLOAD_NOT_FOUND)."""
        with self._held(upload_id, owner) as folder, disk_errors():
            sizes = cut_to_received(folder, tuple(self._limits))
            return Upload(upload_id, sizes[CONFIG_FILE], sizes[WEIGHTS_FILE])

    def all(self, owner: str | None = None) -> tuple[OpenUpload, ...]:
        """The unfinished uploads, the one that expires first at the front."""
        found = []
        for upload_id in self._ids():
            with disk_errors(), suppress(FileNotFoundError):  # removed meanwhile
                found.append(self._described(upload_id))
        own = (upload for upload in found if owner in (None, upload.owner))
        return tuple(sorted(own, key=lambda upload: upload.expires))

    @contextmanager
    def reading(
        self, upload_id: str, owner: str | None = None, *, remove: bool = False
    ) -> Iterator[Directory]:
        """Opens an upload's files, to which nothing is appended meanwhile.

        With `remove` the upload is removed if the block succeeds. Raises
        Refusal(UPLOAD_NOT_FOUND).
        """
        with self._held(upload_id, owner) as folder:
            with disk_errors():
                cut_to_received(folder, tuple(self._limits))
            with open_directory(folder) as directory:
                yield directory
            if remove:
                self._remove(folder)

    def abort(self, upload_id: str, owner: str | None = None) -> None:
        """Removes an upload. Raises Refusal(UPLOAD_NOT_FOUND)."""
        with self._held(upload_id, owner) as folder:
            self._remove(folder)

    def expire(self, dry_run: bool = False) -> tuple[str, ...]:
        """Removes or, in a dry run, only lists the uploads that have expired."""
        expired = []
        for upload_id in self._ids():
            folder = self._root / upload_id
            try:
                owner = lock(folder / "lock", wait=False)
            except OSError:  # in use, or removed meanwhile
                continue
            try:
                if self._now() > self._described(upload_id).expires:
                    expired.append(upload_id)
                    if not dry_run:
                        self._remove(folder)
            except FileNotFoundError:  # removed by the lock's last holder
                continue
            finally:
                os.close(owner)
        return tuple(expired)

    def _now(self) -> float:
        """The time of day, less any jump forward since the start.

        A clock that is set forward would otherwise end uploads that are going on.
        """
        return min(time.time(), self._clock + time.monotonic())

    def clear(self) -> None:
        """Finishes removals that a crash interrupted."""
        with disk_errors():
            for removed in self._root.glob("removed-*"):
                shutil.rmtree(removed, ignore_errors=True)

    def _described(self, upload_id: str) -> OpenUpload:
        """Describes an upload. Raises FileNotFoundError if it is gone."""
        folder = self._root / upload_id
        config, weights = _size(folder / CONFIG_FILE), _size(folder / WEIGHTS_FILE)
        changed, bounds = _last_change(folder), self._bounds
        patience = bounds.expire_seconds if config or weights else bounds.expire_empty_seconds
        peer = _content(folder / _PEER)
        owner = _content(folder / _OWNER)
        return OpenUpload(upload_id, config, weights, peer, changed, changed + patience, owner)

    def _ids(self) -> list[str]:
        with disk_errors():
            return sorted(entry.name for entry in self._root.iterdir() if _ID.match(entry.name))

    @contextmanager
    def _held(self, upload_id: str, owner: str | None) -> Iterator[Path]:
        """Holds the upload's lock. Raises Refusal(OVERLOADED) if another holds it for long."""
        folder = self._root / upload_id
        descriptor = None
        # The owner is compared before the lock is waited for, which would tell of the upload.
        is_own = owner is None or (_ID.match(upload_id) and _content(folder / _OWNER) == owner)
        if is_own and _ID.match(upload_id) and folder.is_dir():
            with disk_errors(), suppress(FileNotFoundError):
                descriptor = _lock_soon(folder / "lock")
        if descriptor is None:
            raise _not_found(upload_id)
        try:
            if not folder.is_dir():  # removed by the lock's last holder
                raise _not_found(upload_id)
            yield folder
        finally:
            os.close(descriptor)

    def _remove(self, folder: Path) -> None:
        gone = self._root / f"removed-{folder.name}"
        with disk_errors():
            reach("store.upload.remove")
            folder.rename(gone)
            reach("store.upload.sync-removed")
            flush(self._root)
        shutil.rmtree(gone, ignore_errors=True)
        reach("store.upload.removed")


def _lock_soon(file: Path) -> int:
    """Takes a lock for which others are waited for at most `_BUSY_SECONDS`.

    A registration of gigabytes holds it for long; those that only ask must not all wait for that.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return lock(file, wait=False)
        except BlockingIOError:
            if time.monotonic() > deadline:
                message = "the upload is being checked or registered; try again later"
                raise Refusal(Reason.OVERLOADED, message) from None
        time.sleep(_POLL_SECONDS)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _content(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _last_change(folder: Path) -> float:
    # The folder itself changes also when the upload is only looked at, by the file of its lock.
    files = [folder / name for name in (RECEIVED, CONFIG_FILE, WEIGHTS_FILE)]
    begun = folder.stat().st_mtime
    return max((file.stat().st_mtime for file in files if file.exists()), default=begun)


def _not_found(upload_id: str) -> Refusal:
    message = "there is no such upload; it may have expired"
    return Refusal(Reason.UPLOAD_NOT_FOUND, message, upload_id)
