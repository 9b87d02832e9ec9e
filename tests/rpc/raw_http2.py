"""A client of HTTP/2 made of bare frames: it can stop in the middle of anything, and never reads.

Frames: RFC 9113, section 4.1. Header fields are literals without indexing (RFC 7541, 6.2.2).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
INITIAL_WINDOW_SIZE = 4
DEFAULT_WINDOW = 65_535


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(fields: Mapping[str, str]) -> bytes:
    """Header fields, each shorter than 127 bytes."""
    parts = []
    for name, value in fields.items():
        parts += [b"\0", bytes([len(name)]), name.encode(), bytes([len(value)]), value.encode()]
    return b"".join(parts)


class RawConnection:
    """A connection; what the server sends is counted, not kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._next = 1
        self._begun = False
        self.ended: set[int] = set()
        """Streams that the server has ended."""
        self.received: dict[int, int] = {}
        """Bytes of data by stream."""
        self.closed = asyncio.Event()
        """The server has closed the connection."""
        self._following: asyncio.Task[None] | None = None

    def begin(self, window: int = DEFAULT_WINDOW) -> None:
        """Starts HTTP/2. The server may send `window` bytes of each stream's data, and no more."""
        self._begun = True
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        self.send(PREFACE + frame(SETTINGS, 0, 0, settings))
        self.follow()

    def follow(self) -> None:
        """Reads frames from here on; once HTTP/2 has begun, acknowledges those that ask for it."""
        self._following = asyncio.create_task(self._follow())

    def send(self, data: bytes) -> None:
        """Sends bytes."""
        self._writer.write(data)

    def call(self, method: str, body: bytes | None = None, end: bool = True) -> int:
        """Begins a call. Without `end` the last byte of the message `body` is never sent."""
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        self.send(frame(HEADERS, END_HEADERS, stream, header_block(fields)))
        if body is not None:
            message = struct.pack(">BI", 0, len(body) + (not end)) + body
            for at in range(0, len(message), 16_384):
                part = message[at : at + 16_384]
                last = end and at + 16_384 >= len(message)
                self.send(frame(DATA, END_STREAM if last else 0, stream, part))
        return stream

    def abort(self) -> None:
        """Closes the connection."""
        if self._following is not None:
            self._following.cancel()
        self._writer.transport.abort()

    async def _follow(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                length = int.from_bytes(head[:3])
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await self._reader.readexactly(length)
                if self._begun and kind in {SETTINGS, PING} and not flags & ACK:
                    self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
                elif kind == DATA:
                    self.received[stream] = self.received.get(stream, 0) + length
                if kind == RST_STREAM or (kind in {DATA, HEADERS} and flags & END_STREAM):
                    self.ended.add(stream)
        except (OSError, asyncio.IncompleteReadError):
            self.closed.set()


@asynccontextmanager
async def raw_connection(
    address: object, window: int | None = None
) -> AsyncIterator[RawConnection]:
    """A connection; with a `window` HTTP/2 has begun on it."""
    host, _, port = str(address).rpartition(":")
    connection = RawConnection(*await asyncio.open_connection(host, int(port)))
    if window is not None:
        connection.begin(window)
    try:
        yield connection
    finally:
        connection.abort()
