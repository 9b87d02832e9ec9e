"""Files of examples on the server, as plain values, and the messages that carry them."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loraplex.errors import invalid
from loraplex.requests import fill
from loraplex.v1 import training_pb2

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class DataFile:
    """An uploaded file of examples. `digest` is "sha256:" and 64 hex digits."""

    data_id: str
    filename: str
    size_bytes: int
    digest: str
    create_time: datetime | None
    labels: Mapping[str, str]


def start(
    filename: str, request_id: str, labels: Mapping[str, str] | None
) -> training_pb2.UploadDataRequest:
    """Returns the first message of an upload. Raises InvalidRequest."""
    head = fill(
        training_pb2.UploadDataStart,
        "start.",
        filename=filename,
        # A retry after a lost reply must not store a second file.
        request_id=request_id or uuid.uuid4().hex,
        labels=labels,
    )
    return training_pb2.UploadDataRequest(start=head)


def opened(data: bytes | str | os.PathLike[str], filename: str) -> tuple[Iterator[bytes], str]:
    """Returns the pieces of bytes or of a local file, and the file's name.

    Raises InvalidRequest if the file cannot be opened.
    """
    if isinstance(data, bytes):
        view = memoryview(data)
        places = range(0, len(data), CHUNK_BYTES)
        return (bytes(view[at : at + CHUNK_BYTES]) for at in places), filename
    path = Path(data)
    try:
        file = path.open("rb")
    except OSError as error:
        raise invalid("data", f"{path} cannot be read: {error.strerror}") from None

    def pieces() -> Iterator[bytes]:
        with file:
            while piece := file.read(CHUNK_BYTES):
                yield piece

    return pieces(), filename or path.name


def messages(
    head: training_pb2.UploadDataRequest, pieces: Iterator[bytes]
) -> Iterator[training_pb2.UploadDataRequest]:
    """Yields the messages of an upload."""
    yield head
    for piece in pieces:
        yield training_pb2.UploadDataRequest(chunk=piece)


async def arriving(
    head: training_pb2.UploadDataRequest, pieces: AsyncIterable[bytes]
) -> AsyncIterator[training_pb2.UploadDataRequest]:
    """Yields the messages of an upload whose bytes come from elsewhere, cut to a fitting size."""
    yield head
    async for piece in pieces:
        for at in range(0, len(piece), CHUNK_BYTES):
            chunk = piece[at : at + CHUNK_BYTES]
            yield training_pb2.UploadDataRequest(chunk=chunk)


class DataPieces:
    """Reads the bytes that a call sends."""

    def receive(self, message: training_pb2.ReadDataResponse) -> bytes:
        return message.chunk

    def end(self, cancelled: bool) -> None:
        """A reader may stop at any time."""
