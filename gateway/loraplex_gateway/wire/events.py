"""Server-sent events, and the end of work whose client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Mapping
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

_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(value: Any, name: str = "") -> bytes:
    """One event with a JSON value; `name` is its type, "" for none."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and closes their source as soon as the client has gone.

    Failures before the first event become an ordinary error response; later ones are sent as an
    event, since the status is on its way. `last` is sent after the source has ended well.
    """

    def __init__(
        self,
        source: AsyncIterator[bytes],
        headers: Mapping[str, str] | None = None,
        last: bytes = DONE,
    ) -> None:
        super().__init__()
        self._source = source
        self._extra = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_all(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await work

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._source, None)
        except (ApiError, LoraplexError) as error:
            await _as_api_error(error).response()(scope, receive, send)
            return
        head = [*_HEADERS, *self._extra]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        async for chunk in _with_pings(first, self._source):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": self._last, "more_body": False})


async def _with_pings(first: bytes | None, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, an error as the last of them, and comments while there are none."""
    if first is not None:
        yield first
    coming: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(source, None))
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield b": waiting\n\n"
                continue
            try:
                chunk = coming.result()
            except (ApiError, LoraplexError) as error:
                yield event(_as_api_error(error).body)
                return
            coming = None
            if chunk is None:
                return
            yield chunk
    finally:
        if coming is not None:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await coming


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client closes its connection meanwhile.

    Raises ApiError (499) then, which nobody reads.
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


def _as_api_error(error: ApiError | LoraplexError) -> ApiError:
    return error if isinstance(error, ApiError) else errors.of(error)
