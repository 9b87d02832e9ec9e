"""The front's end of the engine: it starts the process, talks to it, and replaces it if it is lost.

Runs on one asyncio loop. Nothing here runs per token: a step is one message, and each stream with
outputs in it is woken once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Sequence

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
    PromptScores,
    SetPinned,
    Shutdown,
    StepReport,
    StepStats,
    Submit,
    ToEngine,
    Unload,
    Unmerge,
    Withdraw,
)
from loraplex_server.engine.process.child import EngineProcess
from loraplex_server.engine.process.observer import EngineObserver
from loraplex_server.engine.process.stream import OutputStream, ends

STOP_SECONDS = 5.0
"""Seconds that a stopped engine may take to end before it is killed."""

RESTARTED = Failure(Reason.ENGINE_RESTARTED, "the engine was restarted; try again")
MAX_ORDERS = 1024
"""Orders about adapters that may wait for their answers at once; more are refused."""

TOO_MANY_ORDERS = Failure(
    Reason.OVERLOADED, f"{MAX_ORDERS} orders about adapters are waiting for the engine already"
)
STOPPED = Failure(Reason.DRAINING, "the server is shutting down")

log = logging.getLogger(__name__)


class EngineClient:
    """One engine process and its replacements.

    Attributes:
        hello: first message of the current or last engine process.
        ready: the engine accepts requests now.
        restarts: number of processes lost.
        stats: statistics of the last step; None before the first.
        adapters: the engine's table of adapters by digest.
    """

    hello: Hello

    def __init__(
        self,
        command: Sequence[str],
        observer: EngineObserver,
        backoff: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        """`command` starts the process, which finds its socket through `wire.SOCKET_VARIABLE`.

        `backoff` is the first and the longest pause in seconds before a lost process is replaced.
        """
        self._command = list(command)
        self._observer = observer
        self._backoff = backoff
        self._streams: dict[int, OutputStream] = {}
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._merged: set[str] = set()
        self._ops = itertools.count(1)
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.ready = False
        self.restarts = 0
        self.stats: StepStats | None = None
        self.adapters: dict[str, AdapterStatus] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is no process."""
        return self._process.pid if self._process is not None else None

    # requests and orders

    def submit(self, message: Submit) -> OutputStream:
        """Sends a request. Every failure, a missing engine included, arrives as an output."""
        stream = OutputStream()
        if self.ready:
            self._streams[message.id] = stream
            self._send(message)
        else:
            stream.put(Output(id=message.id, error=self._absence))
        return stream

    def abort(self, request_id: int) -> None:
        """Ends a request; its stream receives nothing more. Unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    async def load(self, ref: AdapterRef) -> None:
        """Makes an adapter resident. Raises `Refusal`."""
        await self._order(Load(next(self._ops), ref))

    async def unload(self, digest: str, force: bool = False, deadline: float | None = None) -> None:
        """Removes an adapter from the device; returns when it is gone. Raises `Refusal`.

        Requests that use it are ended by `force`, or at `deadline` (`time.monotonic()`).
        """
        self._merged.discard(digest)
        await self._order(Unload(next(self._ops), digest, force, deadline))

    async def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Makes an adapter resident and forbids its eviction, or allows it. Raises `Refusal`."""
        await self._order(SetPinned(next(self._ops), ref, pinned))

    async def merge(self, ref: AdapterRef) -> None:
        """Makes dense copies for an adapter; returns when rows use them. Raises `Refusal`."""
        await self._order(Merge(next(self._ops), ref))
        self._merged.add(ref.digest)

    async def unmerge(self, digest: str) -> None:
        """Drops an adapter's dense copies. Raises `Refusal`."""
        self._merged.discard(digest)
        await self._order(Unmerge(next(self._ops), digest))

    async def _order(self, message: Control) -> None:
        """Sends an order and waits for its answer."""
        if not self.ready:
            raise _refusal(self._absence)
        if len(self._pending) >= MAX_ORDERS:
            raise _refusal(TOO_MANY_ORDERS)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending[message.op] = future
        try:
            self._send(message)
            await future
        except asyncio.CancelledError:
            self._send(Withdraw(message.op))
            raise
        finally:
            self._pending.pop(message.op, None)

    @property
    def _absence(self) -> Failure:
        """Why the engine accepts nothing now."""
        return STOPPED if self._stopping else RESTARTED

    def _send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, StepReport):
            for output in message.outputs:
                find = self._streams.pop if ends(output) else self._streams.get
                if (stream := find(output.id, None)) is not None:
                    stream.put(output)
            self.stats = message.stats
            if message.adapters is not None:
                self.adapters = {status.digest: status for status in message.adapters}
            self._observer.on_step(message)
        elif isinstance(message, PromptScores):
            if (stream := self._streams.get(message.id)) is not None:
                stream.put(Output(id=message.id, prompt_logprobs=message.logprobs))
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
                future.set_exception(_refusal(message.error))

    # the process

    async def start(self) -> Hello:
        """Starts the engine and waits until it is ready. Raises `Refusal`."""
        await self._start_process()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        return self.hello

    async def stop(self) -> None:
        """Ends the engine and does not replace it. Streams that are open end with DRAINING."""
        self._stopping = True
        self.ready = False
        if self._process is not None:
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.lost(), STOP_SECONDS)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._kill_process()
        self._fail_all(STOPPED)

    async def _start_process(self) -> None:
        self._process = EngineProcess(self._command, self._receive)
        try:
            self.hello = await self._process.start()
        except BaseException:
            await self._kill_process()
            raise
        self.ready = True
        self._observer.on_ready(self.hello)

    async def _kill_process(self) -> None:
        if self._process is not None:
            await self._process.kill()
            self._process = None

    async def _supervise(self) -> None:
        """Replaces the engine process whenever it is lost."""
        pause, longest = self._backoff
        while True:
            assert self._process is not None
            await self._process.lost()
            if self._stopping:
                return
            self._on_lost()
            orders = self._orders_to_restore()
            self.adapters = {}
            await self._kill_process()
            delay = pause
            while not self.ready:
                await asyncio.sleep(delay)
                delay = min(2 * delay, longest)
                try:
                    await self._start_process()
                except Refusal as error:
                    log.error("the engine did not start again: %s", error.message)
                    self._observer.on_fatal(Fatal(error.reason, error.message))
            for order in orders:
                self._send(order)

    def _orders_to_restore(self) -> list[Control]:
        """Orders that give a new engine the adapters of the lost one: loads, pins and merges."""
        orders: list[Control] = []
        for status in self.adapters.values():
            if status.state not in {"resident", "loading"}:
                continue
            ref = AdapterRef(status.digest, status.path)
            if status.pinned:
                orders.append(SetPinned(next(self._ops), ref, pinned=True))
            else:
                orders.append(Load(next(self._ops), ref))
            if status.digest in self._merged:
                orders.append(Merge(next(self._ops), ref))
        # Pins first, while there is room that no other adapter has to leave.
        return sorted(orders, key=lambda order: not isinstance(order, SetPinned))

    def _on_lost(self) -> None:
        self.ready = False
        self.stats = None
        self.restarts += 1
        log.error("the engine process was lost; %d requests fail", len(self._streams))
        self._fail_all(RESTARTED)
        self._observer.on_restart()

    def _fail_all(self, failure: Failure) -> None:
        """Ends every open stream and every unanswered order with a failure."""
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(Output(id=request_id, error=failure))
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(_refusal(failure))


def _refusal(failure: Failure) -> Refusal:
    return Refusal(failure.reason, failure.message)
