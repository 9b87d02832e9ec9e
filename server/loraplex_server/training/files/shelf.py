"""The uploaded files of examples: who has which, and the bounds on what arrives.

All state belongs to the event loop; the disk is accessed in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.runtime.finishing import to_the_end
from loraplex_server.runtime.lanes import Lane
from loraplex_server.training.data import from_os_error
from loraplex_server.training.files.folder import (
    CHUNK,
    DATA_FILE,
    ArrivingFile,
    DataFolder,
    corrupt,
    not_found,
)
from loraplex_server.training.files.record import DataFileRecord, DataUpload
from loraplex_server.training.records import next_id

MAX_STREAMS: Final = 16
"""Most uploads that may send at the same time; each holds one chunk in memory."""
MAX_STREAMS_PER_PEER: Final = 8
"""Most of them of one peer: a principal or, where callers are not authenticated, an address."""
MAX_READERS: Final = 16
"""Most calls that may read files at the same time; each holds two chunks in memory."""

_CHECK_BYTES: Final = 16 << 20
"""Bytes of an upload after which it is compared with what its principal may have."""

log = logging.getLogger(__name__)

Allowed = Callable[[int, int], Awaitable[None]]
"""Raises Refusal if a principal that has files of so many bytes may not have another one of so
many."""


@dataclass(frozen=True, slots=True)
class ShelfLimits:
    """Limits that the operator sets: the bytes of a file, the number of files, their bytes."""

    file_bytes: int
    files: int
    total_bytes: int


@dataclass(slots=True)
class _Arrival:
    """An upload that sends: whose it is, and how many bytes have arrived."""

    upload: DataUpload
    size: int = 0


class DataShelf:
    """The uploaded files by their ids. `load` it before use."""

    def __init__(self, folder: DataFolder, limits: ShelfLimits, lane: Lane) -> None:
        self._folder = folder
        self._limits = limits
        self._lane = lane
        self._files: dict[str, DataFileRecord] = {}
        self._arriving: list[_Arrival] = []
        self._readers = 0
        self._last_id = ""
        self._one_end = asyncio.Lock()

    async def load(self) -> None:
        """Reads the files from the disk. Raises OSError."""
        found = await self._lane.run(self._folder.load)
        self._files = {record.id: record for record in found}

    def get(self, data_id: str, owner: str | None) -> DataFileRecord:
        """Returns a file of `owner`, as `is_of` says. Raises Refusal(DATA_NOT_FOUND)."""
        record = self._files.get(data_id)
        if record is None or not record.is_of(owner):
            raise not_found(data_id)
        return record

    def page(
        self, size: int, before: str, owner: str | None
    ) -> tuple[Sequence[DataFileRecord], str]:
        """Returns at most `size` files of `owner` older than the id `before`, newest first.

        "" for `before` is no bound. The second value is the last file's id, or "" if there are no
        more.
        """
        found = [
            record
            for data_id, record in sorted(self._files.items(), reverse=True)
            if (not before or data_id < before) and record.is_of(owner)
        ]
        return found[:size], found[size - 1].id if len(found) > size else ""

    def held_bytes(self, principal: str) -> int:
        """Returns the bytes of a principal's files, and of those that arrive."""
        return self._held(principal)

    async def receive(
        self, upload: DataUpload, chunks: AsyncIterator[bytes], allowed: Allowed
    ) -> DataFileRecord:
        """Stores the bytes of `chunks`; returns the earlier file of a repeated upload.

        Raises Refusal: FIELD_INVALID, DATA_CONFLICT, DATA_FULL, OVERLOADED, STORE_FULL,
        STORE_UNAVAILABLE, and what `allowed` raises. Nothing is left of the bytes then.
        """
        self._require_stream(upload)
        arrival = _Arrival(upload)
        self._arriving.append(arrival)
        try:
            return await self._receive(arrival, chunks, allowed)
        except OSError as error:
            log.error("an uploaded data file cannot be written: %s", error)
            raise from_os_error(error) from error
        finally:
            self._arriving.remove(arrival)

    async def _receive(
        self, arrival: _Arrival, chunks: AsyncIterator[bytes], allowed: Allowed
    ) -> DataFileRecord:
        upload, digest, checked = arrival.upload, hashlib.sha256(), 0
        await self._require_room(arrival, 1, allowed)
        data_id = self._last_id = next_id(max(self._last_id, max(self._files, default="")))
        file = None
        if self._known(upload) is None:  # otherwise the bytes are only compared
            file = await self._lane.run(self._folder.begin, data_id)
        try:
            async for chunk in chunks:
                arrival.size += len(chunk)
                if arrival.size > self._limits.file_bytes:
                    raise _invalid(f"the file has more than {self._limits.file_bytes} bytes; the "
                                   "server's setting training_data raises the limit")  # fmt: skip
                if arrival.size - checked >= _CHECK_BYTES:
                    checked = arrival.size
                    await self._require_room(arrival, arrival.size, allowed)
                await self._lane.run(_take, chunk, digest, file)
            if not arrival.size:
                raise _invalid("the file is empty")
            await self._require_room(arrival, arrival.size, allowed)
            record = DataFileRecord(
                id=data_id,
                size=arrival.size,
                digest=f"sha256:{digest.hexdigest()}",
                owner=upload.owner,
                filename=upload.filename,
                created=time.time(),
                labels=upload.labels,
                request_id=upload.request_id,
            )
            kept, file = file, None  # which is done, or given up, even if the caller goes meanwhile
            return await to_the_end(self._keep(record, kept))
        finally:
            if file is not None:
                await to_the_end(self._lane.run(file.abandon))

    async def _keep(self, record: DataFileRecord, file: ArrivingFile | None) -> DataFileRecord:
        """Gives a file its name, unless its request id has one of the same bytes already.

        A file that gets no name is given up.
        """
        try:
            async with self._one_end:
                known = self._earlier(record)
                if known is not None:
                    return known
                if file is None:  # the earlier file has been deleted meanwhile
                    text = "the file of this request id has just been deleted; send it again"
                    raise Refusal(Reason.OVERLOADED, text)
                await self._lane.run(file.finish, record)
                self._files[record.id] = record
                file = None
                return record
        finally:
            if file is not None:
                await self._lane.run(file.abandon)

    def _earlier(self, record: DataFileRecord) -> DataFileRecord | None:
        """The file that a record's request id has already. Raises Refusal(DATA_CONFLICT)."""
        upload = DataUpload(record.owner, "", record.filename, record.request_id)
        known = self._known(upload)
        if known is not None and known.digest != record.digest:
            text = f"the request id was used for the data file {known.id} with other bytes"
            raise Refusal(Reason.DATA_CONFLICT, text, subject=Subject(DATA_FILE, known.id))
        return known

    async def read(self, record: DataFileRecord) -> AsyncGenerator[bytes, None]:
        """Yields the bytes of a file. The last ones come only if all are those of the upload.

        Raises Refusal: DATA_NOT_FOUND, DATA_CORRUPT, OVERLOADED.
        """
        if self._readers >= MAX_READERS:
            text = f"{self._readers} calls read data files already; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        self._readers += 1
        digest, last = hashlib.sha256(), b""
        try:
            with ExitStack() as stack:
                opening = self._folder.opened(record)
                file = await self._lane.run(stack.enter_context, opening)
                while piece := await self._lane.run(_piece, file, digest):
                    if last:
                        yield last
                    last = piece
            if f"sha256:{digest.hexdigest()}" != record.digest:
                raise corrupt(record)
            yield last
        except OSError as error:
            log.error("data file %s cannot be read: %s", record.id, error)
            raise corrupt(record) from error
        finally:
            self._readers -= 1

    def copy(self, record: DataFileRecord, target: Path) -> None:
        """Copies a file; see `DataFolder.copy`. Blocks."""
        self._folder.copy(record, target)

    async def remove(self, data_id: str, owner: str | None) -> None:
        """Deletes a file. Raises Refusal: DATA_NOT_FOUND, STORE_UNAVAILABLE."""
        record = self.get(data_id, owner)
        del self._files[data_id]
        await to_the_end(self._remove(record))

    async def _remove(self, record: DataFileRecord) -> None:
        """Deletes a file that is not listed any more, or lists it again."""
        try:
            await self._lane.run(self._folder.remove, record)
        except FileNotFoundError:
            return
        except OSError as error:
            self._files[record.id] = record
            log.error("data file %s cannot be deleted: %s", record.id, error)
            raise from_os_error(error) from error

    def _known(self, upload: DataUpload) -> DataFileRecord | None:
        """Returns the file of an earlier upload with the same id."""
        if not upload.request_id:
            return None
        for record in self._files.values():
            if (record.request_id, record.owner) == (upload.request_id, upload.owner):
                return record
        return None

    def _held(self, principal: str, without: _Arrival | None = None) -> int:
        there = sum(each.size for each in self._files.values() if each.owner == principal)
        arriving = [each for each in self._arriving if each.upload.owner == principal]
        return there + sum(each.size for each in arriving if each is not without)

    def _require_stream(self, upload: DataUpload) -> None:
        peers = Counter(arrival.upload.peer for arrival in self._arriving)
        running, own = peers.total(), peers[upload.peer]
        if running >= MAX_STREAMS or own >= MAX_STREAMS_PER_PEER:
            text = f"{running} uploads of data files are running, {own} of them from {upload.peer}"
            raise Refusal(Reason.OVERLOADED, f"{text}; try again later")

    async def _require_room(self, arrival: _Arrival, size: int, allowed: Allowed) -> None:
        """Raises Refusal if a file of `size` bytes is more than there may be."""
        files, most = len(self._files) + len(self._arriving), self._limits
        total = sum(record.size for record in self._files.values())
        total += sum(each.size for each in self._arriving if each is not arrival) + size
        if self._known(arrival.upload) is None:
            for field, there, limit, unit in (
                ("training_files", files, most.files, "data files"),
                ("training_files_size", total, most.total_bytes, "bytes of data files"),
            ):
                if there > limit:
                    text = f"the server may keep {limit} {unit} ({field}); delete some"
                    subject = Subject(DATA_FILE, field)
                    raise Refusal(Reason.DATA_FULL, text, subject=subject)
            await allowed(self._held(arrival.upload.owner, arrival), size)


def _take(chunk: bytes, digest: hashlib._Hash, file: ArrivingFile | None) -> None:
    digest.update(chunk)
    if file is not None:
        file.append(chunk)


def _piece(file: IO[bytes], digest: hashlib._Hash) -> bytes:
    piece = file.read(CHUNK)
    digest.update(piece)
    return piece


def _invalid(text: str) -> Refusal:
    return Refusal(Reason.FIELD_INVALID, text, problems=[Problem("chunk", text)])
