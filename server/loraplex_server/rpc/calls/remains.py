"""Frees what the exceptions of an ended call still refer to.

gRPC keeps the exception of an aborted call in the call's state. The traceback of the exception
refers to the frames of the handler, and these frames to the request and the call's state: a cycle,
which only a full garbage collection would free. Full collections are rare, and one cycle can hold
megabytes.
"""

from __future__ import annotations

import asyncio
from functools import partial


def forget_after_call(error: BaseException) -> None:
    """Frees the tracebacks of `error`, and of its causes, when the current task has ended."""
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(partial(_forget, error))


def _forget(error: BaseException, task: object) -> None:
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None:
            chain += (each.__cause__, each.__context__)
            each.__traceback__ = each.__cause__ = each.__context__ = None
