"""Time limits on the shutdown: on each of its steps, and on the whole of it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Final

PART_SECONDS: Final = 5.0
"""Seconds that a part may take to close if it has no work to finish."""

ENGINE_SECONDS: Final = 10.0
"""Seconds that stopping the engine may take, the time until the process is killed included."""

TRAINING_SECONDS: Final = 8.0
"""Seconds that stopping the training may take beyond the time for saving a checkpoint."""

EXIT_SECONDS: Final = 20.0
"""Seconds after `drain_timeout` at which the process ends, whatever still runs."""

log = logging.getLogger(__name__)


async def within(seconds: float, complaint: str, work: Awaitable[None]) -> None:
    """Awaits a step for at most `seconds`; logs `complaint` if it takes longer or fails.

    A step that takes longer is cancelled and not waited for.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
    if not task.done():
        log.error("%s within %g s; going on without it", complaint, seconds)
    elif not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s", complaint, exc_info=error)


def exit_within(seconds: float, code: int, last_step: Callable[[], None]) -> None:
    """Ends the process with `code` after `seconds`, if it has not ended by then.

    `last_step` is called first. Works while the event loop or a thread hangs.
    """

    def end() -> None:
        log.error("the shutdown takes too long; the process ends now")
        try:
            last_step()
        finally:
            os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
