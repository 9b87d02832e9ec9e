"""One engine process as the front sees it: start, first message, socket, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import Fatal, FromEngine, Hello, ToEngine
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.connection import Connection


class EngineProcess:
    """A child process that runs the engine, and the connection to it."""

    def __init__(self, command: Sequence[str], receive: Callable[[FromEngine], None]) -> None:
        """`receive` is called on the loop with every message after the first."""
        self._command = command
        self._receive = receive
        self._child: asyncio.subprocess.Process | None = None
        self._connection: Connection | None = None

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
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_unix_connection(
            lambda: Connection(self._receive), sock=ours
        )
        first = await self._connection.first_message()
        if isinstance(first, Fatal):
            raise Refusal(first.reason, first.message)
        if not isinstance(first, Hello):
            message = "the engine process ended before it was ready; see its log"
            raise Refusal(Reason.ENGINE_FAULT, message)
        return first

    def send(self, message: ToEngine) -> None:
        """Sends a message. No effect without a connection."""
        if self._connection is not None:
            self._connection.write(wire.encode(message))

    async def lost(self) -> None:
        """Waits until the connection is lost; returns at once if there is none."""
        if self._connection is not None:
            await self._connection.lost.wait()

    async def kill(self) -> None:
        """Closes the connection, kills the process and waits for its end. Idempotent."""
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
