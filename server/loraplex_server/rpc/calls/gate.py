"""The gate that every call of our services passes; it closes when the server drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from loraplex_model.base.refusal import Reason, Refusal

T = TypeVar("T")


class CallGate:
    """Counts the running calls of our services and signals when the server drains.

    Attributes:
        draining: new calls are refused.
        require_memory: raises Refusal for a method whose calls must wait for memory.
    """

    def __init__(self) -> None:
        self.draining = False
        self.require_memory: Callable[[str], None] = lambda method: None
        self._calls = 0
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._arrived = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._when_closing: list[Callable[[], None]] = []

    @property
    def calls(self) -> int:
        """Number of calls of our services that run."""
        return self._calls

    def when_closing(self, callback: Callable[[], None]) -> None:
        """Registers a callback, which is called when the gate closes."""
        self._when_closing.append(callback)

    def arrive(self) -> None:
        """Notes that a call of any service has arrived. To be called in the call's task."""
        self._arrived = time.monotonic()
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def enter(self) -> None:
        """Counts a call that begins."""
        self._calls += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts a call that ended."""
        self._calls -= 1
        if self._calls == 0:
            self._idle.set()

    def close(self) -> None:
        """Starts draining: new calls are refused from now on. Idempotent."""
        if self.draining:
            return
        self.draining = True
        self._closing.set()
        for callback in self._when_closing:
            callback()

    async def before_draining(
        self, work: Awaitable[T], refusal: str, seconds: float | None = None
    ) -> T:
        """The result of `work`, which is cancelled when the server starts to drain.

        Raises Refusal(DRAINING) with the text `refusal`, and TimeoutError after `seconds`.
        """
        closing = asyncio.ensure_future(self._closing.wait())
        working = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {working, closing}
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            closing.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait({working})
            if not working.cancelled():
                working.exception()  # has been seen, also if the caller was cancelled meanwhile
        if self.draining:
            raise Refusal(Reason.DRAINING, refusal)
        raise TimeoutError

    async def drained(self) -> None:
        """Returns once no call is running."""
        await self._idle.wait()

    async def ended(self, patience: float) -> None:
        """Returns once the replies of all calls have been sent, and after `patience` anyway."""
        end = time.monotonic() + patience
        while self._tasks and (left := end - time.monotonic()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left)

    async def quiet(self, seconds: float, patience: float) -> None:
        """Returns once no call has arrived for `seconds`, and after `patience` seconds anyway."""
        end = time.monotonic() + patience
        while (left := min(end, self._arrived + seconds) - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
