"""Uploaded files of examples on the disk.

    <root>/018f2c3b4d5e-0a1b2c3d/   complete, or absent
        data                        the bytes
        file.json                   the record
    <root>/.arriving-018f...        an upload that has not ended, or that a crash has ended
    <root>/.leaving-018f...         a file that is being deleted

A file's directory is complete and flushed before it gets its name, and it loses the name before
anything in it is removed. Every method blocks and may raise OSError.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec
from loraplex_model.base.durable import (
    flush,
    flush_file,
    is_shortage,
    make_directory,
    read_regular,
    write_atomically,
)
from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.training.files.record import DataFileRecord

DATA_FILE: Final = "loraplex.v1.DataFile"
"""Resource type that refusals about uploaded files name."""

CHUNK: Final = 1 << 18
"""Bytes that are read at once."""

BYTES: Final = "data"
RECORD: Final = "file.json"
"""Names of the two files in a file's directory."""

_ARRIVING: Final = ".arriving-"
_LEAVING: Final = ".leaving-"
_ID: Final = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")

log = logging.getLogger(__name__)


class DataFolder:
    """The directory of the uploaded files. It is made with the first one."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def load(self) -> list[DataFileRecord]:
        """Reads all files, oldest first, and removes what is left of unfinished uploads.

        A damaged record is logged, and its file is left for the operator.
        """
        found: list[DataFileRecord] = []
        try:
            entries = sorted(self._root.iterdir())
        except FileNotFoundError:
            return found
        for entry in entries:
            if entry.name.startswith((_ARRIVING, _LEAVING)):
                shutil.rmtree(entry, ignore_errors=True)
            elif _ID.fullmatch(entry.name):
                try:
                    content = read_regular(entry / RECORD)
                    found.append(msgspec.json.decode(content, type=DataFileRecord))
                except (msgspec.DecodeError, OSError) as error:
                    log.error("the record of data file %s is damaged: %s", entry.name, error)
        return found

    def begin(self, data_id: str) -> ArrivingFile:
        """Begins a file; it exists once `finish` has returned."""
        assert _ID.fullmatch(data_id), data_id
        make_directory(self._root, mode=0o700)
        folder = self._root / f"{_ARRIVING}{data_id}"
        folder.mkdir(mode=0o700)
        return ArrivingFile(folder, self._root / data_id)

    def remove(self, record: DataFileRecord) -> None:
        """Deletes a file. Those who read it go on."""
        gone = self._root / f"{_LEAVING}{record.id}"
        (self._root / record.id).rename(gone)
        flush(self._root)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def opened(self, record: DataFileRecord) -> Iterator[IO[bytes]]:
        """Opens a file's bytes. Raises Refusal: DATA_NOT_FOUND, DATA_CORRUPT, STORE_UNAVAILABLE."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self._root / record.id / BYTES, flags)
        except FileNotFoundError:
            raise not_found(record.id) from None
        except OSError as error:
            log.error("data file %s cannot be opened: %s", record.id, error)
            if is_shortage(error):
                text = "the server has no free file descriptors or memory; try again"
                raise Refusal(Reason.STORE_UNAVAILABLE, text) from error
            raise corrupt(record) from error
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def copy(self, record: DataFileRecord, target: Path) -> None:
        """Copies a file's bytes to a new file and flushes it.

        Raises Refusal: DATA_NOT_FOUND, DATA_CORRUPT if the bytes are not those that were uploaded.
        """
        digest = hashlib.sha256()
        with self.opened(record) as source, target.open("xb") as file:
            while piece := source.read(CHUNK):
                digest.update(piece)
                file.write(piece)
            if f"sha256:{digest.hexdigest()}" != record.digest:
                raise corrupt(record)
            flush_file(file)


class ArrivingFile:
    """A file whose bytes arrive. `abandon` it unless `finish` has returned."""

    def __init__(self, folder: Path, place: Path) -> None:
        self._folder = folder
        self._place = place
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(folder / BYTES, flags, 0o600), "wb", buffering=0)

    def append(self, piece: bytes) -> None:
        """Writes the next bytes."""
        view = memoryview(piece)
        while view:
            view = view[self._file.write(view) :]

    def finish(self, record: DataFileRecord) -> None:
        """Flushes the bytes and the record to the disk, and gives the file its name."""
        flush_file(self._file)
        self._file.close()
        write_atomically(self._folder / RECORD, msgspec.json.encode(record), mode=0o600)
        flush(self._folder)
        self._folder.rename(self._place)
        flush(self._place.parent)

    def abandon(self) -> None:
        """Removes what has arrived."""
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def not_found(data_id: str) -> Refusal:
    """The refusal for a file that does not exist for the caller."""
    text = "there is no such file of examples"
    return Refusal(Reason.DATA_NOT_FOUND, text, subject=Subject(DATA_FILE, data_id))


def corrupt(record: DataFileRecord) -> Refusal:
    """The refusal for a file whose bytes are not those that were uploaded."""
    text = "the file of examples was damaged on the server's disk; upload it again"
    return Refusal(Reason.DATA_CORRUPT, text, subject=Subject(DATA_FILE, record.id))
