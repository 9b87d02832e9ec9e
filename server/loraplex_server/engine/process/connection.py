"""The front's side of the socket: cuts frames and passes messages on as they arrive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from loraplex_server.engine.messages import FromEngine
from loraplex_server.engine.process import wire

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """Passes every message to `receive`, except the first, which `first_message` returns."""

    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        self._receive = receive
        self._frames = wire.Frames()
        self._transport: asyncio.Transport | None = None
        self._first: asyncio.Future[FromEngine | None] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()

    async def first_message(self) -> FromEngine | None:
        """The engine's first message; None if the connection is lost before it arrives."""
        return await self._first

    def write(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                message = wire.decode_from_engine(payload)
                if self._first.done():
                    self._receive(message)
                else:
                    self._first.set_result(message)
        except wire.WireError as error:
            log.error("the engine sent bytes that are not a message: %s", error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._first.done():
            self._first.set_result(None)
        self.lost.set()
