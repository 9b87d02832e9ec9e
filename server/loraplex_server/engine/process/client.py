"""The engine as the front uses it: requests, orders, and what is lost with a process.

Runs on one asyncio loop. Nothing here runs per token: a step is one message, and each stream with
outputs in it is woken once. `Supervisor` owns the process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ParamSpec, cast

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import (
    Abort,
    AdapterRef,
    AdapterStatus,
    Attempt,
    Control,
    ControlDone,
    Failure,
    Fatal,
    FromEngine,
    Hello,
    LimitHost,
    Load,
    LoadDone,
    Merge,
    MergeDone,
    Output,
    PromptScores,
    SetPinned,
    StepReport,
    StepStats,
    Submit,
    Unload,
    Unmerge,
    Withdraw,
    files_digest,
)
from loraplex_server.engine.process.child import SpawnedEngine
from loraplex_server.engine.process.limits import (
    MAX_ORDERS,
    TOO_MANY_ORDERS,
    SupervisionLimits,
)
from loraplex_server.engine.process.observer import EngineObserver
from loraplex_server.engine.process.restoring import Restoration
from loraplex_server.engine.process.stream import REFUSED, RESTARTED, STOPPED, OutputStream, ends
from loraplex_server.engine.process.supervisor import Cause, Supervisor
from loraplex_server.engine.process.suspect_loads import SuspectLoads
from loraplex_server.engine.process.suspects import Evidence, LossReport, Suspects
from loraplex_server.engine.statistics import BatchView, Look

P = ParamSpec("P")
log = logging.getLogger(__name__)


class EngineClient:
    """One engine process and its replacements.

    Attributes:
        requests: what the process has been given and has not ended, by number.
        restarts: number of processes lost.
        stats: statistics of the last step; None before the first.
        adapters: the engine's table of adapters by digest.
        quarantined: adapters by digest that are not given to the engine, each with the reason.
    """

    def __init__(
        self,
        command: Sequence[str],
        observer: EngineObserver,
        backoff: tuple[float, float] | None = None,
        limits: SupervisionLimits | None = None,
        environment: Mapping[str, str] | None = None,
        evidence: Evidence | None = None,
        is_last: Callable[[], bool] = lambda: True,
        spawned: SpawnedEngine | None = None,
    ) -> None:
        """`command` starts the process, which finds its socket through `wire.SOCKET_VARIABLE`.

        `backoff` replaces the first and the longest pause of `limits`. Engines of one server share
        `evidence`; for `environment`, `is_last` and `spawned` see `Supervisor`.
        """
        limits = limits or SupervisionLimits()
        if backoff is not None:
            limits = replace(limits, first_pause=backoff[0], longest_pause=backoff[1])
        self._observer = observer
        self._supervisor = Supervisor(
            command, self._receive, self, limits, environment, is_last, spawned
        )
        evidence = evidence or Evidence()
        self._suspects = Suspects(limits, evidence=evidence)
        self._suspect_loads = SuspectLoads(self._suspects)
        self._restoration = Restoration()
        self._report = LossReport()
        self._streams: dict[int, OutputStream] = {}
        self.requests: dict[int, Submit] = {}
        self._pending: dict[int, asyncio.Future[BatchView | None]] = {}
        self._ops = itertools.count(1)
        self.restarts = 0
        self.stats: StepStats | None = None
        self.adapters: dict[str, AdapterStatus] = {}
        self.quarantined = evidence.quarantined

    @property
    def hello(self) -> Hello:
        """First message of the first engine process; those of all others are equal."""
        return self._supervisor.hello

    @property
    def ready(self) -> bool:
        """Whether the engine accepts requests now."""
        return self._supervisor.ready

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is no process."""
        return self._supervisor.pid

    @property
    def pids(self) -> list[int]:
        """Process ids of all engine processes."""
        return [] if self.pid is None else [self.pid]

    @property
    def has_given_up(self) -> bool:
        """Whether the engine is away, and was lost so often that only others go on."""
        return self._supervisor.has_given_up

    # requests and orders

    def submit(self, message: Submit) -> OutputStream:
        """Sends a request. Every failure, a missing engine included, arrives as an output."""
        stream = OutputStream()
        failure = self._objection(message)
        if failure is not None:
            stream.put(Output(id=message.id, error=failure))
            return stream
        self._streams[message.id] = stream
        suspects = [ref for ref in message.adapters if self._suspects.is_suspect(ref.digest)]
        if suspects or self._suspects.ran_at_last_end(message):
            self._suspect_loads.start(self._submit_apart(message, stream, suspects))
        else:
            self._send(message)
        return stream

    def _send(self, message: Submit) -> None:
        """Gives a request to the engine, unless it has ended."""
        if message.id in self._streams:
            self.requests[message.id] = message
            self._supervisor.send(message)

    async def _submit_apart(
        self, message: Submit, stream: OutputStream, suspects: Sequence[AdapterRef]
    ) -> None:
        """Sends a request once its suspect adapters have been loaded, one after the other.

        A suspect request is sent when no other suspect adapter is being loaded.
        """
        try:
            for ref in suspects:
                await self.load(ref)
        except Refusal as refusal:
            failure = Failure(refusal.reason, refusal.message)
            self._finish(Output(id=message.id, error=failure))
            return
        if not self._suspects.ran_at_last_end(message):
            self._send(message)
            return
        await self._suspect_loads.begin(
            lambda: self._send(message),
            lambda: message.id in self._streams and not stream.has_begun,
            alone=self._suspects.is_one_of_several(message),
        )

    def _objection(self, message: Submit) -> Failure | None:
        """Why a request is not sent to the engine; None if it is."""
        if not self.ready:
            return self._absence
        for ref in message.adapters:
            if (failure := self._quarantine_of(ref.digest)) is not None:
                return failure
        return REFUSED if self._suspects.refuses(message) else None

    def abort(self, request_id: int) -> None:
        """Ends a request; its stream receives nothing more. Unknown ids are ignored."""
        self.requests.pop(request_id, None)
        if self._streams.pop(request_id, None) is not None:
            self._supervisor.send(Abort(request_id))

    async def load(self, ref: AdapterRef) -> None:
        """Makes an adapter resident. Raises `Refusal`."""
        await self._order_load(Load(next(self._ops), ref))

    async def unload(self, digest: str, force: bool = False, deadline: float | None = None) -> None:
        """Removes an adapter from the device; returns when it is gone. Raises `Refusal`.

        Requests that use it are ended by `force`, or at `deadline` (`time.monotonic()`).
        """
        self._restoration.merged.discard(digest)
        await self._order(Unload(next(self._ops), digest, force, deadline))

    async def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Makes an adapter resident and forbids its eviction, or allows it. Raises `Refusal`."""
        await self._order_load(SetPinned(next(self._ops), ref, pinned))

    async def merge(self, ref: AdapterRef) -> None:
        """Makes dense copies for an adapter; returns when rows use them. Raises `Refusal`."""
        await self._order_load(Merge(next(self._ops), ref))
        self._restoration.merged.add(ref.digest)

    async def unmerge(self, digest: str) -> None:
        """Drops an adapter's dense copies. Raises `Refusal`."""
        self._restoration.merged.discard(digest)
        await self._order(Unmerge(next(self._ops), digest))

    def limit_host(self, nbytes: int | None) -> None:
        """Limits the bytes of adapters in host memory; None lifts the limit. Not answered."""
        self._supervisor.send(LimitHost(nbytes))

    def forget(self, digest: str, only_pin: bool = False) -> None:
        """Has an adapter, or its pin, not restored by the next process."""
        (self._restoration.unpin if only_pin else self._restoration.drop)(digest)

    async def _order_load(self, message: Load | SetPinned | Merge) -> None:
        """Sends an order that may load or merge its adapter; a suspect waits for the others."""
        digest = message.adapter.digest
        if isinstance(message, SetPinned) and not message.pinned:
            await self._order(message)
            return

        async def order() -> None:
            if (failure := self._quarantine_of(digest)) is not None:
                raise _refusal(failure)
            await self._order(message)

        await self._suspect_loads.run(digest, order)

    def _quarantine_of(self, digest: str) -> Failure | None:
        why = self.quarantined.get(files_digest(digest))
        text = f"the adapter {files_digest(digest)} is quarantined: {why}"
        return None if why is None else Failure(Reason.ADAPTER_QUARANTINED, text)

    def release(self, digest: str) -> None:
        """Allows a quarantined adapter again, and drops what was counted against it."""
        self.quarantined.pop(digest, None)
        self._suspects.forget(digest)

    async def look(self) -> BatchView:
        """The batch of the engine between two steps. Raises `Refusal`."""
        return cast(BatchView, await self._order(Look(next(self._ops))))

    async def _order(self, message: Control | Look) -> BatchView | None:
        """Sends an order, or a question, and waits for its answer."""
        if not self.ready:
            raise _refusal(self._absence)
        if len(self._pending) >= MAX_ORDERS:
            raise _refusal(TOO_MANY_ORDERS)
        future: asyncio.Future[BatchView | None] = asyncio.get_running_loop().create_future()
        self._pending[message.op] = future
        try:
            self._supervisor.send(message)
            return await future
        except asyncio.CancelledError:
            self._supervisor.send(Withdraw(message.op))
            raise
        finally:
            self._pending.pop(message.op, None)

    @property
    def _absence(self) -> Failure:
        """Why the engine accepts nothing now."""
        return STOPPED if self._supervisor.stopping else RESTARTED

    # messages

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, StepReport):
            for output in message.outputs:
                if ends(output):
                    self._finish(output)
                elif (stream := self._streams.get(output.id)) is not None:
                    stream.put(output)
            self.stats = message.stats
            if message.adapters is not None:
                self.adapters = {status.digest: status for status in message.adapters}
            self._notify(self._observer.on_step, message)
        elif isinstance(message, PromptScores):
            if (stream := self._streams.get(message.id)) is not None:
                stream.put(Output(id=message.id, prompt_logprobs=message.logprobs))
        elif isinstance(message, Attempt):
            self._suspects.attempt(message)
        elif isinstance(message, LoadDone):
            self._suspects.on_load(message)
            self._notify(self._observer.on_load, message)
        elif isinstance(message, MergeDone):
            self._suspects.on_merge(message)
            self._notify(self._observer.on_merge, message)
        elif isinstance(message, ControlDone | BatchView):
            self._restoration.done(message.op)
            future = self._pending.pop(message.op, None)
            if future is None or future.done():
                return
            if isinstance(message, BatchView):
                future.set_result(message)
            elif message.error is None:
                future.set_result(None)
            else:
                future.set_exception(_refusal(message.error))

    def _finish(self, output: Output) -> None:
        """Puts the last output of a request into its stream, if that is still read."""
        request = self.requests.pop(output.id, None)
        if request is not None and output.finish is not None:
            self._suspects.on_finish(request)
        if (stream := self._streams.pop(output.id, None)) is not None:
            stream.put(output)

    def _notify(self, notice: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls the observer, whose faults must not end the connection to the engine."""
        try:
            notice(*args, **kwargs)
        except Exception:
            log.exception("an observer of the engine failed")

    # the process

    async def start(self) -> Hello:
        """Starts the engine and waits until it is ready. Raises `Refusal`."""
        return await self._supervisor.start()

    async def stop(self) -> None:
        """Ends the engine and does not replace it. Streams that are open end with DRAINING."""
        await self._supervisor.stop()
        self._suspect_loads.cancel()
        self._fail_all(STOPPED)

    # events of the process

    def on_ready(self, hello: Hello) -> None:
        """A process accepts messages: gives it the adapters of the lost one."""
        for order in self._restoration.orders(self._ops):
            self._supervisor.send(order)
        self._notify(self._observer.on_ready, hello)

    def on_lost(self) -> None:
        """The process was lost: its requests fail; the adapters that it worked on are suspects."""
        self.stats = None
        self.restarts += 1
        log.error("the engine process was lost; %d requests fail", len(self._streams))
        self._report = self._suspects.on_death(self.requests.values())
        self.quarantined.update(self._report.quarantined)
        self._restoration.on_lost(
            self.adapters.values(),
            lambda d: self._suspects.is_suspect(d) or files_digest(d) in self.quarantined,
        )
        self.adapters = {}
        self._fail_all(RESTARTED)
        self._notify(self._observer.on_restart)

    def on_end(self, cause: Cause) -> None:
        """The lost process has ended, or a replacement has failed to start."""
        report, self._report = self._report, LossReport()
        if cause is not Cause.START:
            log.error("the engine process has ended: %s", cause, extra={"cause": cause.value})
        for digest in sorted(report.suspects - report.quarantined.keys()):
            text = "adapter %s was being loaded or merged; the next call for it loads it again"
            log.error(text, digest)
        for digest, reason in report.quarantined.items():
            log.critical("adapter %s is quarantined: %s", digest, reason)
        if report.requests:
            log.critical("a request is quarantined: it was running at each of the last ends")
        self._notify(self._observer.on_death, cause, report)

    def on_failed_start(self, refusal: Refusal) -> None:
        """A replacement could not be started; another attempt follows."""
        log.error("the engine did not start again: %s", refusal.message)
        self._notify(self._observer.on_fatal, Fatal(refusal.reason, refusal.message))

    def _fail_all(self, failure: Failure) -> None:
        """Ends every open stream and every unanswered order with a failure."""
        streams, self._streams = self._streams, {}
        self.requests.clear()
        for request_id, stream in streams.items():
            stream.put(Output(id=request_id, error=failure))
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(_refusal(failure))


def _refusal(failure: Failure) -> Refusal:
    return Refusal(failure.reason, failure.message)
