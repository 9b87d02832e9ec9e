"""Long-lived tasks whose unexpected end is noticed.

A task that ends with an exception is silent until it is awaited, and a task that should run as long
as the process is not awaited. Such tasks are started by `WatchedTask`. If one ends although it was
not stopped, the event loop's exception handler is called; the server's handler, set by
`on_unexpected_end`, ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final

THREAD_SECONDS: Final = 5.0
"""Seconds between two looks at a watched thread."""

CANCEL_SECONDS: Final = 1.0
"""Seconds after which a task that is being stopped is cancelled again."""

_KEY: Final = "watched_task"


class WatchedTask:
    """A task that runs until `stop` is called. After `release` the task may also end by itself."""

    def __init__(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._may_end = False
        # It may be started by a call, whose caller and request id it would inherit.
        own = contextvars.Context()
        self._task = asyncio.get_running_loop().create_task(work, name=name, context=own)
        self._task.add_done_callback(self._on_end)

    @property
    def task(self) -> asyncio.Task[None]:
        """The task itself, to wait for."""
        return self._task

    def release(self) -> None:
        """Allows the task to end."""
        self._may_end = True

    def cancel(self) -> None:
        """Allows the task to end, and cancels it."""
        self.release()
        self._task.cancel()

    async def stop(self) -> None:
        """Cancels the task and waits for its end. Idempotent.

        Cancels repeatedly, because before Python 3.12 `asyncio.wait_for` can lose a cancellation.
        """
        self.release()
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CANCEL_SECONDS)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if self._may_end:
            if error is not None:
                context = {"message": "a task failed while it was stopped", "exception": error}
                task.get_loop().call_exception_handler(context)
            return
        text = "a task ended that should run as long as the process"
        context = {"message": text, _KEY: task.get_name()}
        if error is not None:
            context["exception"] = error
        task.get_loop().call_exception_handler(context)


async def while_alive(thread: threading.Thread) -> None:
    """Returns when a thread has ended; the work of a `WatchedTask` that watches the thread."""
    while thread.is_alive():  # noqa: ASYNC110  (a thread sets no event when it ends)
        await asyncio.sleep(THREAD_SECONDS)


def on_unexpected_end(
    loop: asyncio.AbstractEventLoop, act: Callable[[str, BaseException | None], None]
) -> None:
    """Calls `act` with a task's name and its exception when a watched task ends unexpectedly.

    Everything else that the event loop reports is logged as by default.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if _KEY in context:
            act(context[_KEY], context.get("exception"))
        else:
            with contextlib.suppress(Exception):
                loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
