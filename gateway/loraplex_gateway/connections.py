"""Connections of HTTP: what a peer may send before it asks, and how long it may take."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 << 10
"""Most bytes of a request's first line and headers, and of what a peer sends between its pieces."""

MAX_HEADERS: Final = 128
"""Most headers of a request."""

HEAD_SECONDS: Final = 20.0
"""Time in which the head of a request must arrive, or the rest of one that is answered already."""

STALLED_SECONDS: Final = 60.0
"""Time after which a peer that takes none of what is sent to it is given up."""

SPARE_CONNECTIONS: Final = 64
"""Connections above the limit of the settings, for health, metrics, and answers that say so."""

IS_SPARE: Final = "loraplex_gateway.spare"
"""In the scope of a request that came over a spare connection."""

_SPARE: Final = 256
"""Descriptors for what is no connection of a caller."""

_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedConnection(HttpToolsProtocol):
    """A connection that is closed if its peer sends too much, too slowly, or takes nothing.

    uvicorn bounds neither the size nor the time of a request's head. `close_if_late` is to be
    called about once in a second. Bodies are bounded by who reads them. If as many connections as
    `limit_of` allows are open, a spare one takes a single request, which is marked by `IS_SPARE`.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._is_spare = False
        self._unread = 0
        self._owes_since: float | None = None
        self._stalled_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owes_since = self.loop.time()
        if self.limit_concurrency is None:
            return
        spare = self.limit_concurrency - len(self.connections)
        self._is_spare = spare <= SPARE_CONNECTIONS
        if spare <= 0:
            transport.abort()

    def close_if_late(self, now: float) -> None:
        """Closes the connection if its peer is late at `now`, a time of the event loop."""
        if self._stalled_since is not None and now - self._stalled_since > STALLED_SECONDS:
            self.transport.abort()
        since = self._owes_since
        if since is not None and now - since > HEAD_SECONDS and self._is_idle():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._is_idle():
                self.transport.write(_TOO_LARGE)
                self.transport.close()
            else:
                self.transport.abort()
        elif self._owes_since is None and self._is_idle() and not self.timeout_keep_alive_task:
            self._owes_since = self.loop.time()  # empty lines before a request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._is_spare:
            self.scope[IS_SPARE] = True  # type: ignore[typeddict-unknown-key]
        if self._owes_since is None:
            self._owes_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ValueError("too many headers")  # the parser answers 400

    def on_headers_complete(self) -> None:
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1:
            raise ValueError("two hosts")  # programs in front may look at the other one
        self._unread = 0
        self._owes_since = None
        super().on_headers_complete()
        if self.cycle is None:
            return
        if self.scope["http_version"] == "1.0":
            # Such a peer does not know chunks: the end of the connection is that of the answer.
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _AnyLength()
        if self._is_spare:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        self._owes_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body:  # it was answered before all of it was there
            self._owes_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete


class _AnyLength(int):
    """The length of an answer that is not known before its end: uvicorn counts down to zero."""

    def __lt__(self, other: int) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    def __sub__(self, other: int) -> _AnyLength:
        return self

    __hash__ = int.__hash__


def limit_of(connections: int) -> int:
    """uvicorn's `limit_concurrency` for so many connections of callers."""
    return connections + SPARE_CONNECTIONS + 1


def allow_descriptors(connections: int) -> None:
    """Raises the process's limit of open files for so many connections, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit_of(connections) + _SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
