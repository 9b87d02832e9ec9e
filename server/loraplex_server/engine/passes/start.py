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

    If device memory runs out, a second attempt has at most half of the tokens. Rows that are left
    out of the second attempt are computed in a later step.
    """
    started = _attempt(scheduler, now, compute)
    if note_memory(scheduler, tally, started.rows, started.error):
        started = _attempt(scheduler, now, compute)
        note_memory(scheduler, tally, started.rows, started.error)
    return started


def note_memory(
    scheduler: Scheduler, tally: PassTally, rows: list[BatchRow], error: Exception | None
) -> bool:
    """Makes the next passes smaller if a pass of `rows` failed for lack of device memory.

    Returns whether `error`, that of the pass, is of this kind.
    """
    if not isinstance(error, OutOfDeviceMemory):
        return False
    tokens = sum(row.count for row in rows)
    log.warning("a pass of %d tokens ran out of device memory; the next ones are smaller", tokens)
    tally.out_of_memory += 1
    scheduler.narrow(tokens // 2)
    return True


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
