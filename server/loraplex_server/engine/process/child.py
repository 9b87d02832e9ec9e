"""One engine process as the front sees it: start, first message, messages, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import Beat, Fatal, FromEngine, Hello, ToEngine
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.pulse import Hang, PulseCheck

END_SECONDS = 1.0
"""Seconds that a process which has closed its socket may take to end by itself."""
KILL_SECONDS = 10.0
"""Seconds that a killed process may take to end; one that waits for a device may never end."""
LOOK_SECONDS = 0.01
"""Seconds between two looks at a process that is about to end."""

_now = time.monotonic

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpawnedEngine:
    """A process that was started, and the front's end of the socket to it.

    The process ends when that end is closed, whoever closes it.
    """

    process: subprocess.Popen[bytes]
    front: socket.socket

    def abandon(self) -> None:
        """Lets the process end, unless somebody else uses the socket. Idempotent."""
        self.front.close()


def spawn(command: Sequence[str], environment: Mapping[str, str] | None = None) -> SpawnedEngine:
    """Starts a process with one end of a socket. Raises OSError.

    `environment` is added to that of this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # the front's standard output belongs to the front
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    **(environment or {}),
                    wire.SOCKET_VARIABLE: str(theirs.fileno()),
                },
            )
    except BaseException:
        ours.close()
        raise
    return SpawnedEngine(process, ours)


class EngineProcess(asyncio.Protocol):
    """A child process that runs the engine, and the socket to it."""

    def __init__(
        self,
        command: Sequence[str],
        receive: Callable[[FromEngine], None],
        environment: Mapping[str, str] | None = None,
        spawned: SpawnedEngine | None = None,
    ) -> None:
        """`receive` is called on the loop with every message after the first.

        `environment` is added to that of this process. `spawned` is a process that was started by
        the same command already.
        """
        self._command = command
        self._environment = environment
        self._receive = receive
        self._spawned = spawned
        self._transport: asyncio.Transport | None = None
        self._frames = wire.Frames()
        self._first: asyncio.Future[FromEngine | None] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()
        self._check: PulseCheck | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None before the process exists."""
        return self._spawned.process.pid if self._spawned is not None else None

    async def start(self) -> Hello:
        """Starts the process and waits until it is ready. Raises `Refusal`.

        After an exception, `kill` must be called.
        """
        try:
            await self._connect()
        except OSError as error:
            message = f"the engine process cannot be started: {error.strerror or error}"
            raise Refusal(Reason.ENGINE_FAULT, message) from error
        first = await self._first
        if isinstance(first, Fatal):
            raise Refusal(first.reason, first.message)
        if not isinstance(first, Hello):
            message = "the engine process ended before it was ready; see its log"
            raise Refusal(Reason.ENGINE_FAULT, message)
        return first

    async def _connect(self) -> None:
        """Starts the process, if that has not been done, and connects to it. Raises OSError."""
        if self._spawned is None:
            self._spawned = spawn(self._command, self._environment)
        sock = self._spawned.front
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=sock)
        except BaseException:
            # A process that was started after all ends when it finds its socket closed.
            self._spawned.abandon()
            raise

    def send(self, message: ToEngine) -> None:
        """Sends a message. No effect without a connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    async def lost(self, check: PulseCheck | None = None) -> Hang | None:
        """Waits until the connection is lost; returns at once if there is none.

        With a `check`, also returns when the process hangs, and then how.
        """
        if self._transport is None:
            return None
        self._check = check
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(check.tick if check else None):
                    await self._lost.wait()
            if check is not None and not self._lost.is_set() and (hang := check.look(_now())):
                return hang
        return None

    async def kill(self) -> int | None:
        """Closes the connection, kills the process and waits for its end. Idempotent.

        Returns the exit status, or minus the number of the signal that ended the process; None if
        there was no process or it cannot be killed.
        """
        if self._transport is not None:
            self._transport.abort()
        if self._spawned is None:
            return None
        process = self._spawned.process
        try:
            if self._lost.is_set():
                # It has closed its socket, so it is ending by itself: its own status is wanted.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_SECONDS):
                        return await _end_of(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        try:
            async with asyncio.timeout(KILL_SECONDS):
                return await _end_of(process)
        except TimeoutError:
            log.error("the engine process %d does not end although it was killed", process.pid)
            return None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for payload in self._frames.feed(data):
                message = wire.decode(payload, wire.FROM_ENGINE)
                if self._check is not None:
                    self._check.heard(message if isinstance(message, Beat) else None)
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


async def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Waits until a process has ended; returns its status, as `EngineProcess.kill`."""
    while (status := process.poll()) is None:  # noqa: ASYNC110 - a process sets no event
        await asyncio.sleep(LOOK_SECONDS)
    return status
