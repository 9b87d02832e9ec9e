"""One engine process as the front sees it: start, first message, messages, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import Fatal, FromEngine, Hello, ToEngine
from loraplex_server.engine.process import wire

log = logging.getLogger(__name__)


class EngineProcess(asyncio.Protocol):
    """A child process that runs the engine, and the socket to it."""

    def __init__(self, command: Sequence[str], receive: Callable[[FromEngine], None]) -> None:
        """`receive` is called on the loop with every message after the first."""
        self._command = command
        self._receive = receive
        self._child: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._frames = wire.Frames()
        self._first: asyncio.Future[FromEngine | None] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id; None before the process exists."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> Hello:
        """Starts the process and waits until it is ready. Raises `Refusal`.

        After an exception, `kill` must be called.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._child = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # the front's standard output belongs to the front
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, wire.SOCKET_VARIABLE: str(theirs.fileno())},
                )
        except OSError as error:
            ours.close()
            message = f"the engine process cannot be started: {error.strerror}"
            raise Refusal(Reason.ENGINE_FAULT, message) from error
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        first = await self._first
        if isinstance(first, Fatal):
            raise Refusal(first.reason, first.message)
        if not isinstance(first, Hello):
            message = "the engine process ended before it was ready; see its log"
            raise Refusal(Reason.ENGINE_FAULT, message)
        return first

    def send(self, message: ToEngine) -> None:
        """Sends a message. No effect without a connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    async def lost(self) -> None:
        """Waits until the connection is lost; returns at once if there is none."""
        if self._transport is not None:
            await self._lost.wait()

    async def kill(self) -> None:
        """Closes the connection, kills the process and waits for its end. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for payload in self._frames.feed(data):
                message = wire.decode(payload, wire.FROM_ENGINE)
                if self._first.done():
                    self._receive(message)
                else:
                    self._first.set_result(message)
        except wire.WireError as error:
            log.error("the engine sent bytes that are not a message: %s", error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._first.done():
            self._first.set_result(None)
        self._lost.set()
