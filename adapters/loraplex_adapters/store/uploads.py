"""Uploads: an adapter's two files, received in pieces; they survive restarts of the server.

    <store>/uploads/lock                    held while an upload is begun
    <store>/uploads/<id>/lock               held while the upload is written, read or removed
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

from loraplex_model.base.durable import flush, lock, make_directory
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
from loraplex_adapters.store.received import cut_to_received, record_received

_ID = re.compile(r"\A[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class UploadBounds:
    """Limits of uploads.

    Attributes:
        max_weights_bytes: size of one weights file.
        max_open: number of unfinished uploads.
        expire_seconds: time from the last piece to the removal of an unfinished upload.
    """

    max_weights_bytes: int = 4 << 30
    max_open: int = 16
    expire_seconds: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Upload:
    """Progress of an upload: the size of each file, which is the offset of its next piece."""

    id: str
    config_bytes: int
    weights_bytes: int


class Uploads:
    """The unfinished uploads of a store. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_FULL or STORE_UNAVAILABLE) if the disk fails.
    """

    def __init__(self, root: Path, bounds: UploadBounds) -> None:
        self._root = root / "uploads"
        self._bounds = bounds
        self._limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: bounds.max_weights_bytes}
        with disk_errors():
            make_directory(self._root)

    def begin(self) -> str:
        """Begins an upload; returns its id. Raises Refusal(OVERLOADED) if too many are open."""
        with locked(self._root):
            self.expire()
            if len(self._ids()) >= self._bounds.max_open:
                raise Refusal(Reason.OVERLOADED, "too many uploads are open; finish or abort some")
            upload_id = uuid.uuid4().hex
            with disk_errors():
                reach("store.upload.make")
                (self._root / upload_id).mkdir()
                reach("store.upload.made")
                record_received(self._root / upload_id, {})
                flush(self._root)
        return upload_id

    def append(self, upload_id: str, file: str, offset: int, data: bytes | memoryview) -> int:
        """Appends `data` to "adapter_config.json" or "adapter_model.safetensors"; returns its size.

        `offset` must be the file's size before, so that a piece sent twice does no harm.
        Raises Refusal: UPLOAD_NOT_FOUND; UPLOAD_OFFSET (the message and `state` give the right
        offset); FIELD_INVALID (not a file of an adapter); ADAPTER_TOO_LARGE.
        """
        limit = self._limits.get(file)
        if limit is None:
            message = f"an upload has the files {CONFIG_FILE} and {WEIGHTS_FILE}"
            raise Refusal(Reason.FIELD_INVALID, message, "file")
        with self._held(upload_id) as folder, disk_errors():
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

    def state(self, upload_id: str) -> Upload:
        """Returns the progress of an upload. Raises Refusal(UPLOAD_NOT_FOUND)."""
        with self._held(upload_id) as folder, disk_errors():
            sizes = cut_to_received(folder, tuple(self._limits))
            return Upload(upload_id, sizes[CONFIG_FILE], sizes[WEIGHTS_FILE])

    @contextmanager
    def reading(self, upload_id: str, *, remove: bool = False) -> Iterator[Directory]:
        """Opens an upload's files, to which nothing is appended meanwhile.

        With `remove` the upload is removed if the block succeeds. Raises
        Refusal(UPLOAD_NOT_FOUND).
        """
        with self._held(upload_id) as folder:
            with disk_errors():
                cut_to_received(folder, tuple(self._limits))
            with open_directory(folder) as directory:
                yield directory
            if remove:
                self._remove(folder)

    def abort(self, upload_id: str) -> None:
        """Removes an upload. Raises Refusal(UPLOAD_NOT_FOUND)."""
        with self._held(upload_id) as folder:
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
                if time.time() - _last_change(folder) > self._bounds.expire_seconds:
                    expired.append(upload_id)
                    if not dry_run:
                        self._remove(folder)
            finally:
                os.close(owner)
        return tuple(expired)

    def clear(self) -> None:
        """Finishes removals that a crash interrupted."""
        with disk_errors():
            for removed in self._root.glob("removed-*"):
                shutil.rmtree(removed, ignore_errors=True)

    def _ids(self) -> list[str]:
        with disk_errors():
            return sorted(entry.name for entry in self._root.iterdir() if _ID.match(entry.name))

    @contextmanager
    def _held(self, upload_id: str) -> Iterator[Path]:
        """Waits for the upload's lock and holds it."""
        folder = self._root / upload_id
        descriptor = None
        if _ID.match(upload_id) and folder.is_dir():
            with disk_errors(), suppress(FileNotFoundError):
                descriptor = lock(folder / "lock")
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


def _last_change(folder: Path) -> float:
    files = (folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    return max(file.stat().st_mtime for file in files if file.exists())


def _not_found(upload_id: str) -> Refusal:
    message = "there is no such upload; it may have expired"
    return Refusal(Reason.UPLOAD_NOT_FOUND, message, upload_id)
