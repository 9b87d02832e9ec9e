"""Server-sent events, and the end of work whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from loraplex import LoraplexError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex_gateway import errors
from loraplex_gateway.errors import ApiError

T = TypeVar("T")

KEEP_ALIVE_SECONDS: Final = 15.0
"""Silence after which a comment is sent, since proxies close idle connections."""

DONE: Final = b"data: [DONE]\n\n"
"""The last event of a stream."""

PING: Final = b": waiting\n\n"
"""A comment, which clients skip."""

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


def event(value: Any, name: str = "") -> bytes:
    """One event with a JSON value; `name` is its type, "" for none."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + _encode(value) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and closes their source as soon as the client has gone.

    `headers` are added to the response; if they are a function, it is called once the first event
    is there. A failure before that becomes an ordinary error response, unless the first event takes
    longer than KEEP_ALIVE_SECONDS; a later one is sent as an event, since the status is on its way.
    `last` is sent at the end, also after a failure.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        last: bytes = DONE,
    ) -> None:
        super().__init__()
        self._source = source
        self._extra = headers
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_all(_Sender(send), scope, receive))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await work

    async def _send_all(self, sender: _Sender, scope: Scope, receive: Receive) -> None:
        async with contextlib.aclosing(self._source):
            try:
                sender.begin_later(self._head)
                async for chunk in self._source:
                    await sender.write(chunk)
            except (ApiError, LoraplexError) as error:
                failure = error if isinstance(error, ApiError) else errors.of(error)
            except Exception as error:
                failure = errors.fault(error, scope)
            else:
                await sender.end(self._last)
                return
            finally:
                sender.stop_pings()
            if not sender.begun:
                await failure.response()(scope, receive, sender.send)
                return
            await sender.end(event(failure.body) + self._last)

    def _head(self) -> list[tuple[bytes, bytes]]:
        extra = self._extra() if callable(self._extra) else self._extra or {}
        return [*_HEADERS, *((k.lower().encode(), v.encode("latin-1")) for k, v in extra.items())]


class _Sender:
    """Writes the parts of one response: its head with the first event, and comments in silence.

    Attributes:
        begun: whether the head has been sent.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.begun = False
        self._head: Callable[[], list[tuple[bytes, bytes]]] = list
        self._loop = asyncio.get_running_loop()
        self._written = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._ping: asyncio.Task[None] | None = None
        self._writing = False

    def begin_later(self, head: Callable[[], list[tuple[bytes, bytes]]]) -> None:
        """Sets the function that returns the headers, and begins to watch for silence."""
        self._head = head
        self._timer = self._loop.call_later(KEEP_ALIVE_SECONDS, self._look)

    def stop_pings(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()
        self._timer = None

    async def write(self, chunk: bytes) -> None:
        """Sends a part of the body; returns once the connection takes more."""
        if self._ping is not None and not self._ping.done():
            await asyncio.wait({self._ping})
        self._writing = True
        try:
            await self._begin()
            await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            self._writing = False
            self._written = self._loop.time()

    async def end(self, chunk: bytes) -> None:
        """Sends the last part."""
        await self._begin()
        await self.send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def _begin(self) -> None:
        if not self.begun:
            self.begun = True
            await self.send({"type": "http.response.start", "status": 200, "headers": self._head()})

    def _look(self) -> None:
        """Sends a comment if nothing was sent for long, and looks again when that may be so."""
        silence = self._loop.time() - self._written
        if silence >= KEEP_ALIVE_SECONDS and not self._writing:
            self._ping = self._loop.create_task(self._send_ping())
            silence = 0.0
        self._timer = self._loop.call_later(max(0.01, KEEP_ALIVE_SECONDS - silence), self._look)

    async def _send_ping(self) -> None:
        self._written = self._loop.time()
        with contextlib.suppress(OSError):
            await self._begin()
            await self.send({"type": "http.response.body", "body": PING, "more_body": True})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client closes its connection meanwhile.

    Raises ApiError (499) then, which nobody reads. The body of the request must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LoraplexError):
                await task


async def _gone(receive: Receive) -> None:
    """Returns once the client has closed its connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
