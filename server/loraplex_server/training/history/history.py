"""The events of all jobs. The disk is accessed in threads; all state belongs to the event loop.

Steps are written once a second, everything else at once, so a server that is killed loses no more
than the steps of a second, which its trainer repeats. Events are of less worth than the training:
if they cannot be written, the job goes on without them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import msgspec

from loraplex_server.runtime.finishing import to_the_end
from loraplex_server.runtime.lanes import Lane
from loraplex_server.training.data import from_os_error
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.history.file import EventFile
from loraplex_server.training.records import Records

MAX_PAGE_BYTES: Final = 2 << 20
"""Bytes of JSON of the events of a page; a message of gRPC has at most twice as many."""

_WRITE_SECONDS: Final = 1.0
"""Longest time for which an event of a step is kept in memory before the next one is written."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """The events of a job that has not ended."""

    file: EventFile
    pending: list[JobEventRecord] = field(default_factory=list)
    written: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_open: bool = False


class JobHistories:
    """Records what happens to jobs, and lists it."""

    def __init__(self, records: Records, lane: Lane) -> None:
        self._records = records
        self._lane = lane
        self._jobs: dict[str, _Open] = {}

    def of(self, job_id: str) -> JobHistory:
        """Returns the history of one job."""
        return JobHistory(self, job_id)

    async def add(self, job_id: str, events: Sequence[JobEventRecord], last: bool = False) -> None:
        """Records events in order, with numbers and, where it is missing, the time.

        After the `last` ones no more follow.
        """
        if not events:
            return
        job = self._jobs.setdefault(job_id, _Open(EventFile(self._records.folder(job_id))))
        now, steps_only = time.time(), all(event.progress is not None for event in events)
        async with job.turn:
            await self._opened(job_id, job)
            for event in events:
                job.file.last += 1
                changes = {"number": job.file.last, "time": event.time or now}
                job.pending.append(msgspec.structs.replace(event, **changes))
            if last or not steps_only or time.monotonic() - job.written >= _WRITE_SECONDS:
                await self._write(job_id, job, last)
        if last:
            self._jobs.pop(job_id, None)

    async def rewind(self, job_id: str, step: int) -> None:
        """Removes the trainer's events after `step`, which it is about to repeat."""
        job = self._jobs.setdefault(job_id, _Open(EventFile(self._records.folder(job_id))))
        async with job.turn:
            await self._opened(job_id, job)
            await self._write(job_id, job)
            try:
                await self._lane.run(job.file.rewind, step)
            except OSError as error:
                log.warning("the events of training job %s cannot be written: %s", job_id, error)

    async def page(
        self, job_id: str, size: int, after: int, newest_first: bool
    ) -> tuple[list[JobEventRecord], int]:
        """Returns at most `size` events after the event `after`, which is 0 for the first page.

        The second value is the number of the last one, or 0 if there are no more. Raises
        Refusal(STORE_UNAVAILABLE).
        """
        job = self._jobs.get(job_id)
        file = EventFile(self._records.folder(job_id)) if job is None else job.file
        if job is not None:
            async with job.turn:
                await self._write(job_id, job)
        try:
            return await self._lane.run(_page, file, size, after, newest_first)
        except OSError as error:
            raise from_os_error(error) from error

    async def _opened(self, job_id: str, job: _Open) -> None:
        if not job.is_open:
            job.is_open = True
            try:
                await self._lane.run(job.file.open)
            except OSError as error:
                log.warning("the events of training job %s cannot be read: %s", job_id, error)

    async def _write(self, job_id: str, job: _Open, durably: bool = False) -> None:
        events, job.pending = job.pending, []
        job.written = time.monotonic()
        if events:
            await to_the_end(self._append(job_id, job, events, durably))

    async def _append(
        self, job_id: str, job: _Open, events: list[JobEventRecord], durably: bool
    ) -> None:
        try:
            await self._lane.run(job.file.append, events, durably)
        except OSError as error:
            log.warning("the events of training job %s cannot be written: %s", job_id, error)


@dataclass(frozen=True, slots=True)
class JobHistory:
    """Records what happens to one job."""

    histories: JobHistories
    job_id: str

    async def add(self, *events: JobEventRecord) -> None:
        """Records events in order."""
        await self.histories.add(self.job_id, events)

    async def rewind(self, step: int) -> None:
        """Removes the trainer's events after `step`, which it is about to repeat."""
        await self.histories.rewind(self.job_id, step)


def _page(
    file: EventFile, size: int, after: int, newest_first: bool
) -> tuple[list[JobEventRecord], int]:
    found = list(file.read())
    if newest_first:
        found.reverse()
        rest = (event for event in found if not after or event.number < after)
    else:
        rest = (event for event in found if event.number > after)
    page: list[JobEventRecord] = []
    nbytes = 0
    for event in islice(rest, size):
        nbytes += len(msgspec.json.encode(event))
        if page and nbytes > MAX_PAGE_BYTES:
            return page, page[-1].number
        page.append(event)
    more = next(rest, None) is not None
    return page, page[-1].number if page and more else 0
