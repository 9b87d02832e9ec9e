"""Suspects are kept apart, so that an end points to one of them; see `suspects`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from loraplex_server.engine.process.suspects import Suspects

START_SECONDS: Final = 10.0
"""Longest wait of a suspect adapter for the first tokens of suspect requests, and of such a request
for the load of a suspect adapter, which may hang."""

_POLL_SECONDS: Final = 0.02


class SuspectLoads:
    """Runs work on suspect adapters one after the other, and all other work at once.

    Suspect requests begin between such work: without this, a request that ends the engine, sent
    again by its client, would end it during the same load again. Those of which one would be
    refused, if it were the only one, begin one after the other.
    """

    def __init__(self, suspects: Suspects) -> None:
        self._suspects = suspects
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: list[Callable[[], bool]] = []

    async def run(self, digest: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` on an adapter; for a suspect, after the work on other suspects.

        A caller that is cancelled does not end the work. Raises what `work` raises.
        """
        if not self._suspects.is_suspect(digest):
            await work()
            return

        async def alone() -> None:
            async with self._one:
                await self._requests_started()
                await work()

        await asyncio.shield(self.start(alone()))

    async def begin(
        self, send: Callable[[], None], is_starting: Callable[[], bool], alone: bool
    ) -> None:
        """Calls `send` for a suspect request, when no suspect adapter is loaded or merged.

        `is_starting` tells whether the request's first token is still awaited. A request that
        begins `alone` waits for those of the others, and has the others wait for its own.
        """
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._one.acquire()
        except TimeoutError:
            send()
        else:
            try:
                if alone:
                    await self._requests_started()
                send()
                if alone:
                    self._starting = [is_starting]
                    await self._requests_started()
            finally:
                self._one.release()
        self._starting = [each for each in self._starting if each()]
        self._starting.append(is_starting)

    async def _requests_started(self) -> None:
        end = time.monotonic() + START_SECONDS
        while any(each() for each in self._starting):
            if time.monotonic() > end:
                break
            await asyncio.sleep(_POLL_SECONDS)
        self._starting = []

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` as a task that ends at the latest with `cancel`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def cancel(self) -> None:
        """Ends all tasks."""
        for task in self._tasks:
            task.cancel()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller, if there still is one, is given the exception
