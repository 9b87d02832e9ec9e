"""Starting a pass, and starting it once more with half of its tokens if memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.faults import reach

from loraplex_server.engine.batching.layout import lay_out
from loraplex_server.engine.batching.scheduler import BatchRow, Scheduler
from loraplex_server.engine.passes.tally import PassTally
from loraplex_server.engine.runner.protocol import OutOfDeviceMemory

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StartedPass(Generic[T]):
    """The rows of a pass, and either its `result` or the `error` that it failed with.

    Without rows there is neither.
    """

    rows: list[BatchRow]
    result: T | None = None
    error: Exception | None = None


def start(
    scheduler: Scheduler,
    tally: PassTally,
    now: float,
    compute: Callable[[list[BatchRow], ForwardBatch], T],
) -> StartedPass[T]:
    """Schedules rows and computes them.

    If device memory runs out, a second attempt has at most half of the tokens. The rows left out of
    it lose nothing: a later step computes them.
    """
    started = _attempt(scheduler, now, compute)
    if not isinstance(started.error, OutOfDeviceMemory):
        return started
    tally.out_of_memory += 1
    tokens = sum(row.count for row in started.rows)
    log.warning("a pass of %d tokens ran out of device memory and is made smaller", tokens)
    scheduler.narrow(tokens // 2)
    started = _attempt(scheduler, now, compute)
    tally.out_of_memory += isinstance(started.error, OutOfDeviceMemory)
    return started


def _attempt(
    scheduler: Scheduler, now: float, compute: Callable[[list[BatchRow], ForwardBatch], T]
) -> StartedPass[T]:
    rows = scheduler.schedule(now)
    if not rows:
        return StartedPass(rows)
    batch = lay_out(rows)
    try:
        reach("engine.before_step")
        return StartedPass(rows, compute(rows, batch))
    except Exception as error:
        return StartedPass(rows, error=error)
