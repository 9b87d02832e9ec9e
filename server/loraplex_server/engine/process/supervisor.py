"""Keeps one engine process running: starts, watches and replaces it, or gives up.

start -----> ready --- ends, or hangs and is killed ---> lost
               ^                                          |
               |            pause, which grows            |
               +------------- the same base --------------+
                                   |                      |
                         another: BaseChanged    too often: EngineLost
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import FromEngine, Hello, Shutdown, ToEngine
from loraplex_server.engine.process.child import EngineProcess, SpawnedEngine
from loraplex_server.engine.process.identity import BaseChanged, differences, tokenizer_digests
from loraplex_server.engine.process.limits import RestartPolicy, SupervisionLimits
from loraplex_server.engine.process.pulse import Hang, PulseCheck
from loraplex_server.runtime.hub import OFFLINE
from loraplex_server.runtime.watched import WatchedTask

STOP_SECONDS = 5.0
"""Seconds that a stopped engine may take to end before it is killed."""

RESTART_FACTOR = 4.0
"""A replacement may take this many times as long as the first start."""

log = logging.getLogger(__name__)


class EngineLost(Exception):
    """The engine cannot be kept running. The message says how many processes ended."""


class Cause(StrEnum):
    """Ways in which an engine process is lost."""

    EXIT = "exit"
    SIGNAL = "signal"
    SILENT = "silent"
    STUCK = "stuck"
    START = "start"


class ProcessEvents(Protocol):
    """Receives the events of the process. Called on the event loop."""

    def on_ready(self, hello: Hello) -> None:
        """A process accepts messages."""

    def on_lost(self) -> None:
        """The process was lost and accepts nothing more."""

    def on_end(self, cause: Cause) -> None:
        """The lost process has ended, or a replacement has failed to start."""

    def on_failed_start(self, refusal: Refusal) -> None:
        """A replacement could not be started; another attempt follows."""


class Supervisor:
    """One engine process and its replacements.

    Attributes:
        hello: first message of the first process, which all others repeat.
        ready: the process accepts messages.
        stopping: `stop` was called.
    """

    hello: Hello

    def __init__(
        self,
        command: Sequence[str],
        receive: Callable[[FromEngine], None],
        events: ProcessEvents,
        limits: SupervisionLimits,
        environment: Mapping[str, str] | None = None,
        is_last: Callable[[], bool] = lambda: True,
        spawned: SpawnedEngine | None = None,
    ) -> None:
        """`command` starts the process, which finds its socket through `wire.SOCKET_VARIABLE`.

        `spawned` is the first process, if it was started already. `environment` is added to that of
        this process. `is_last` tells whether no other engine of
        the server is left; until then this one is not given up for good.
        """
        self._command = list(command)
        self._environment = environment
        self._is_last = is_last
        self._spawned = spawned
        self._receive = receive
        self._events = events
        self._limits = limits
        self._policy = RestartPolicy(limits)
        self._restart_seconds = limits.restart
        self._tokenizer: Mapping[str, str] = {}
        self._process: EngineProcess | None = None
        self._task: WatchedTask | None = None
        self.ready = False
        self.stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is no process."""
        return self._process.pid if self._process is not None else None

    @property
    def has_given_up(self) -> bool:
        """Whether the process is away, and was lost so often that only others go on."""
        return not self.ready and self._policy.gives_up

    def send(self, message: ToEngine) -> None:
        """Sends a message. No effect without a process."""
        if self._process is not None:
            self._process.send(message)

    async def start(self) -> Hello:
        """Starts the first process, and from then on replaces it. Raises `Refusal`."""
        begun = time.monotonic()
        self.hello = await self._start(self._limits.start)
        self._environment = {**(self._environment or {}), **OFFLINE}
        took = time.monotonic() - begun
        self._restart_seconds = max(self._limits.restart, RESTART_FACTOR * took)
        try:
            self._tokenizer = await asyncio.to_thread(tokenizer_digests, self.hello)
        except BaseException:
            await self._kill()
            raise
        self._become_ready()
        self._task = WatchedTask(self._supervise(), "engine supervisor")
        return self.hello

    async def stop(self) -> None:
        """Ends the process and does not replace it."""
        self.stopping = True
        self.ready = False
        if self._task is not None:
            self._task.release()
        if self._process is not None:
            self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.lost(), STOP_SECONDS)
        if self._task is not None:
            await self._task.stop()
        await self._kill()

    async def _supervise(self) -> None:
        """Replaces the process whenever it is lost. Raises EngineLost or BaseChanged."""
        while not self.stopping:
            assert self._process is not None
            check = PulseCheck(self._limits.silent, self._limits.stuck)
            hang = await self._process.lost(check)
            if self.stopping:
                return
            self.ready = False
            self._policy.on_end()
            self._events.on_lost()
            if hang is not None:
                log.error("the engine process hangs (%s) and is killed", hang)
            self._events.on_end(_cause(hang, await self._kill()))
            await self._replace()

    async def _replace(self) -> None:
        """Starts new processes until one is ready. Raises EngineLost or BaseChanged."""
        while not (self.ready or self.stopping):
            if self._policy.gives_up and self._is_last():
                raise EngineLost(f"the engine cannot be kept running: {self._policy}")
            await asyncio.sleep(self._policy.pause)
            try:
                hello = await self._start(self._restart_seconds)
                await self._require_same(hello)
            except BaseChanged:
                await self._kill()
                raise
            except Exception as error:
                await self._kill()
                self._policy.on_end()
                self._events.on_end(Cause.START)
                self._events.on_failed_start(_refusal(error))
            else:
                self._become_ready()

    async def _start(self, seconds: float) -> Hello:
        """Starts a process, which has `seconds` to become ready. Raises `Refusal`."""
        spawned, self._spawned = self._spawned, None
        self._process = EngineProcess(self._command, self._receive, self._environment, spawned)
        try:
            async with asyncio.timeout(seconds):
                return await self._process.start()
        except TimeoutError:
            await self._kill()
            # It may have had to build a cache again that the first process found.
            longer = min(2.0 * self._restart_seconds, self._limits.start)
            self._restart_seconds = max(self._restart_seconds, longer)
            text = f"the engine process was not ready after {seconds:g} s"
            raise Refusal(Reason.ENGINE_FAULT, text) from None
        except BaseException:
            await self._kill()
            raise

    async def _require_same(self, hello: Hello) -> None:
        """Raises BaseChanged unless the process serves what the first one served."""
        found = differences(self.hello, hello)
        tokenizer = await asyncio.to_thread(tokenizer_digests, hello)
        found += [
            f"{name} has other contents"
            for name in tokenizer.keys() & self._tokenizer.keys()
            if tokenizer[name] != self._tokenizer[name]
        ]
        if found:
            raise BaseChanged("the restarted engine serves another base: " + "; ".join(found))

    def _become_ready(self) -> None:
        if self.stopping:
            return
        self._policy.on_ready()
        self.ready = True
        self._events.on_ready(self.hello)

    async def _kill(self) -> int | None:
        """Ends the process; returns its exit status as `EngineProcess.kill`."""
        process, self._process = self._process, None
        return await process.kill() if process is not None else None


def _cause(hang: Hang | None, status: int | None) -> Cause:
    if hang is not None:
        return Cause(hang.value)
    return Cause.SIGNAL if status is not None and status < 0 else Cause.EXIT


def _refusal(error: Exception) -> Refusal:
    """Why a process did not start. Other exceptions than refusals are logged with their trace."""
    if isinstance(error, Refusal):
        return error
    log.error("the engine process cannot be started", exc_info=error)
    return Refusal(Reason.ENGINE_FAULT, f"the engine process cannot be started: {error}")
