"""Work that runs to its end even if its caller is cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from loraplex_model.base.refusal import Refusal

T = TypeVar("T")

log = logging.getLogger(__name__)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is not cancelled with its caller.

    If the caller is gone, an exception of `work` is logged, unless it is a Refusal.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_report)
        raise


def _report(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, Refusal):
        log.error("work failed after its caller was gone", exc_info=error)
