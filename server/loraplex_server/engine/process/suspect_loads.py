"""Suspect adapters are loaded or merged one at a time, so that an end points to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from loraplex_server.engine.process.suspects import Suspects


class SuspectLoads:
    """Runs work on suspect adapters one after the other, and all other work at once."""

    def __init__(self, suspects: Suspects) -> None:
        self._suspects = suspects
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, digest: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` on an adapter; for a suspect, after the work on other suspects.

        A caller that is cancelled does not end the work. Raises what `work` raises.
        """
        if not self._suspects.is_suspect(digest):
            await work()
            return

        async def alone() -> None:
            async with self._one:
                await work()

        await asyncio.shield(self.start(alone()))

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
