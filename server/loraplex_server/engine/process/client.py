"""The front's end of the engine: it starts the process, speaks to it, and starts it again.

Runs on one asyncio loop. Nothing here is per token: a step is one message, and each stream that got
something in it is woken once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import (
    Abort,
    AdapterRef,
    AdapterStatus,
    Control,
    ControlDone,
    Failure,
    Fatal,
    FromEngine,
    Hello,
    Load,
    LoadDone,
    Merge,
    MergeDone,
    Output,
    Pin,
    Shutdown,
    StepDone,
    StepStats,
    Submit,
    ToEngine,
    Unload,
    Unmerge,
)
from loraplex_server.engine.process import wire
from loraplex_server.engine.process.connection import Connection

STOP_SECONDS = 5.0
"""How long a stopped engine may take to leave before it is killed."""

RESTARTED = Failure(Reason.ENGINE_RESTARTED, "the engine was restarted; try again")
STOPPED = Failure(Reason.DRAINING, "the server is shutting down")

log = logging.getLogger(__name__)


class EngineObserver(Protocol):
    """Told of what happens in the engine; called on the loop, must be quick and must not raise."""

    def on_step(self, done: StepDone) -> None:
        """A step ended. Called after its outputs reached their streams."""

    def on_load(self, done: LoadDone) -> None:
        """An adapter load ended."""

    def on_merge(self, done: MergeDone) -> None:
        """An adapter was merged or unmerged, or was not."""

    def on_restart(self) -> None:
        """The engine process was lost; running requests have failed, a new process is coming."""

    def on_ready(self, hello: Hello) -> None:
        """The engine is ready, for the first time or again."""

    def on_fatal(self, fatal: Fatal) -> None:
        """A new process could not start; it will be tried again."""


class OutputStream(AsyncIterator[Output]):
    """The outputs of one request, in order; it ends after the one with a finish or an error.

    Read it one by one, or with `take` all that has gathered, but by one reader.
    """

    __slots__ = ("_complete", "_ended", "_not_before", "_outputs", "_waiter")

    def __init__(self) -> None:
        self._outputs: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._complete = False
        self._ended = False
        self._not_before = 0.0

    def put(self, output: Output) -> None:
        """Adds an output and wakes the reader, if it is time."""
        self._outputs.append(output)
        self._complete = ends(output)
        if self._complete or time.monotonic() >= self._not_before:
            self._wake()

    async def take(self, not_before: float = 0.0) -> list[Output]:
        """All outputs that are there, at least one; empty once the last has been taken.

        It returns when the last output is there, and before that not earlier than `not_before`
        (`time.monotonic()`): whoever can wait is woken once for several steps.
        """
        if self._ended:
            return []
        self._not_before = not_before
        while not self._outputs or not (self._complete or time.monotonic() >= not_before):
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            early = time.monotonic() < not_before < math.inf
            timer = loop.call_at(not_before, self._wake) if early else None
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        taken = list(self._outputs)
        self._outputs.clear()
        self._not_before = 0.0
        self._ended = self._complete
        return taken

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def __anext__(self) -> Output:
        while not self._outputs:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output = self._outputs.popleft()
        self._ended = ends(output)
        return output


def ends(output: Output) -> bool:
    """Whether it is the last output of its request."""
    return output.finish is not None or output.error is not None


class EngineClient:
    """One engine process and its replacements.

    Attributes:
        hello: what the engine said when it was last ready.
        ready: whether it takes requests now.
        restarts: how often a process was lost.
        stats: of the last step; None before the first.
        adapters: the engine's table of adapters by digest.
    """

    hello: Hello

    def __init__(
        self,
        command: Sequence[str],
        observer: EngineObserver,
        backoff: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        """`command` starts the process; it finds its socket through `wire.SOCKET_VARIABLE`.

        `backoff` is the first and the longest pause in seconds before a lost process is replaced.
        """
        self._command = list(command)
        self._observer = observer
        self._backoff = backoff
        self._streams: dict[int, OutputStream] = {}
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._merged: set[str] = set()
        self._ops = itertools.count(1)
        self._process: asyncio.subprocess.Process | None = None
        self._connection: Connection | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.ready = False
        self.restarts = 0
        self.stats: StepStats | None = None
        self.adapters: dict[str, AdapterStatus] = {}

    @property
    def pid(self) -> int | None:
        """The engine's process id, if there is a process."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> Hello:
        """Starts the engine and waits until it is ready. Raises `Refusal`."""
        try:
            await self._launch()
        except BaseException:
            await self._bury()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        return self.hello

    def submit(self, message: Submit) -> OutputStream:
        """Sends a request. Its failures, this process's absence among them, arrive as an output."""
        stream = OutputStream()
        if not self.ready:
            failure = STOPPED if self._stopping else RESTARTED
            stream.put(Output(id=message.id, error=failure))
            return stream
        self._streams[message.id] = stream
        self._send(message)
        return stream

    def abort(self, request_id: int) -> None:
        """Drops a request; nothing more comes on its stream. Unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    async def load(self, ref: AdapterRef) -> None:
        """Makes an adapter resident. Raises `Refusal`."""
        await self._ask(Load(next(self._ops), ref))

    async def unload(self, digest: str, force: bool = False, deadline: float | None = None) -> None:
        """Takes an adapter off the device and returns when it is. Raises `Refusal`.

        The requests that use it are aborted by `force`, or at `deadline` (`time.monotonic()`).
        """
        self._merged.discard(digest)
        await self._ask(Unload(next(self._ops), digest, force, deadline))

    async def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Makes an adapter resident for good, or lets it be evicted. Raises `Refusal`."""
        await self._ask(Pin(next(self._ops), ref, pinned))

    async def merge(self, ref: AdapterRef) -> None:
        """Gives an adapter dense copies and returns when they are used. Raises `Refusal`."""
        await self._ask(Merge(next(self._ops), ref))
        self._merged.add(ref.digest)

    async def unmerge(self, digest: str) -> None:
        """Drops an adapter's dense copies. Raises `Refusal`."""
        self._merged.discard(digest)
        await self._ask(Unmerge(next(self._ops), digest))

    async def stop(self) -> None:
        """Ends the engine and does not replace it. Streams that are open end with DRAINING."""
        self._stopping = True
        self.ready = False
        if self._connection is not None:
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connection.lost.wait(), STOP_SECONDS)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._bury()
        self._fail_all(STOPPED)

    # the process

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
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
        self.hello = first
        self.ready = True
        self._observer.on_ready(first)

    async def _bury(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _supervise(self) -> None:
        pause, longest = self._backoff
        while True:
            assert self._connection is not None
            await self._connection.lost.wait()
            if self._stopping:
                return
            self._mourn()
            orders = self._orders()
            self.adapters = {}
            await self._bury()
            delay = pause
            while not self.ready:
                await asyncio.sleep(delay)
                delay = min(2 * delay, longest)
                try:
                    await self._launch()
                except Refusal as error:
                    log.error("the engine did not start again: %s", error.message)
                    self._observer.on_fatal(Fatal(error.reason, error.message))
                    await self._bury()
            for order in orders:
                self._send(order)

    def _orders(self) -> list[Control]:
        """What brings a new engine to where this one was: loads, pins, and merges by order."""
        orders: list[Control] = []
        for status in self.adapters.values():
            if status.state not in {"resident", "loading"}:
                continue
            ref = AdapterRef(status.digest, status.path)
            if status.pinned:
                orders.append(Pin(next(self._ops), ref, pinned=True))
            else:
                orders.append(Load(next(self._ops), ref))
            if status.digest in self._merged:
                orders.append(Merge(next(self._ops), ref))
        # What may not be evicted comes first.
        return sorted(orders, key=lambda order: not isinstance(order, Pin))

    def _mourn(self) -> None:
        self.ready = False
        self.stats = None
        self.restarts += 1
        log.error("the engine process was lost; %d requests fail", len(self._streams))
        self._fail_all(RESTARTED)
        self._observer.on_restart()

    def _fail_all(self, failure: Failure) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(Output(id=request_id, error=failure))
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(Refusal(failure.reason, failure.message))

    # messages

    def _send(self, message: ToEngine) -> None:
        if self._connection is not None:
            self._connection.write(wire.encode(message))

    async def _ask(self, message: Control) -> None:
        if not self.ready:
            failure = STOPPED if self._stopping else RESTARTED
            raise Refusal(failure.reason, failure.message)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending[message.op] = future
        try:
            self._send(message)
            await future
        finally:
            self._pending.pop(message.op, None)

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, StepDone):
            for output in message.outputs:
                self._deliver(output)
            self.stats = message.stats
            if message.adapters is not None:
                self.adapters = {status.digest: status for status in message.adapters}
            self._observer.on_step(message)
        elif isinstance(message, LoadDone):
            self._observer.on_load(message)
        elif isinstance(message, MergeDone):
            self._observer.on_merge(message)
        elif isinstance(message, ControlDone):
            future = self._pending.pop(message.op, None)
            if future is None or future.done():
                return
            if message.error is None:
                future.set_result(None)
            else:
                future.set_exception(Refusal(message.error.reason, message.error.message))

    def _deliver(self, output: Output) -> None:
        last = ends(output)
        stream = self._streams.pop(output.id, None) if last else self._streams.get(output.id)
        if stream is not None:
            stream.put(output)
