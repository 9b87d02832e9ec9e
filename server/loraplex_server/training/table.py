"""All training jobs in memory and on the disk; publishes every change to those who watch.

All state belongs to the event loop; the disk is accessed in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.runtime.lanes import Lane
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.history.history import JobHistories
from loraplex_server.training.jobs import JOB, JobRecord, State
from loraplex_server.training.records import Records

MAX_WATCHERS: Final = 64
WATCH_SECONDS: Final = 0.1
"""Shortest time between two states that one watcher receives."""

log = logging.getLogger(__name__)


class JobTable:
    """The jobs by their ids. The last `kept` ones that ended are kept of those.

    The threads of `lane` read and write their files.

    Attributes:
        histories: the events of the jobs. Those of their states are recorded here.
    """

    def __init__(self, records: Records, kept: int, lane: Lane) -> None:
        self._records = records
        self._lane = lane
        self._kept = kept
        self._jobs: dict[str, JobRecord] = {}
        self._changed = asyncio.Event()
        self._watchers = 0
        self.histories = JobHistories(records, lane)

    async def load(self) -> Sequence[JobRecord]:
        """Reads the jobs from the disk, oldest first. Raises OSError."""
        found = await self._lane.run(self._records.load)
        self._jobs = {job.id: job for job in found}
        return found

    def __iter__(self) -> Iterator[JobRecord]:
        return iter(self._jobs.values())

    def get(self, job_id: str, owner: str | None = None) -> JobRecord:
        """Returns a job of `owner`, as in `JobRecord.is_of`. Raises Refusal(JOB_NOT_FOUND)."""
        job = self._jobs.get(job_id)
        if job is None or not job.is_of(owner):
            text = "there is no such training job"
            raise Refusal(Reason.JOB_NOT_FOUND, text, subject=Subject(JOB, job_id))
        return job

    def page(
        self, size: int, before: str, states: Collection[State], owner: str | None = None
    ) -> tuple[Sequence[JobRecord], str]:
        """Returns at most `size` jobs of `owner` older than the id `before`, newest first.

        "" for `before` is no bound. The second value is the last job's id, or "" if there are no
        more.
        """
        found = [
            job
            for job_id, job in sorted(self._jobs.items(), reverse=True)
            if (not before or job_id < before)
            and (not states or job.state in states)
            and job.is_of(owner)
        ]
        return found[:size], found[size - 1].id if len(found) > size else ""

    def newest_id(self) -> str:
        """Returns the id of the newest job, or "" if there is none."""
        return max(self._jobs, default="")

    async def add(self, job: JobRecord) -> None:
        """Adds a new job whose record is on the disk."""
        self._jobs[job.id] = job
        await self.histories.add(job.id, entered(job))

    async def publish(self, job: JobRecord, save: bool = True) -> None:
        """Replaces a job's state: first on the disk, unless `save` is false, then for everybody."""
        if save:
            try:
                await self._lane.run(self._records.save, job)
            except OSError as error:
                log.error("the record of training job %s cannot be written: %s", job.id, error)
        before = self._jobs.get(job.id)
        self._jobs[job.id] = job
        self.wake()
        if before is None or before.state is not job.state:
            await self.histories.add(job.id, entered(job), last=job.final)

    def wake(self) -> None:
        """Wakes all that wait for a change: of a job, or of the positions in the queue."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Waits for the next change of any job."""
        await self._changed.wait()

    async def watch(
        self, job_id: str, position: Callable[[JobRecord], int], owner: str | None = None
    ) -> AsyncGenerator[JobRecord, None]:
        """Yields a job of `owner` now and after each change, until it has ended or is interrupted.

        A change of its `position` counts. A slow reader receives the newest state only. Raises
        Refusal: JOB_NOT_FOUND, OVERLOADED.
        """
        job = self.get(job_id, owner)
        if self._watchers >= MAX_WATCHERS:
            text = f"{self._watchers} calls watch jobs already; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        self._watchers += 1
        try:
            while True:
                place = position(job)
                yield job
                if job.final or job.state is State.INTERRUPTED:
                    return
                await asyncio.sleep(WATCH_SECONDS)
                while self._jobs.get(job_id) is job and position(job) == place:
                    await self.change()
                job = self.get(job_id)
        finally:
            self._watchers -= 1

    async def forget_old(self) -> None:
        """Removes ended jobs, with their files, beyond the number kept: first to end, first out."""
        ended = sorted((job for job in self if job.final), key=lambda job: job.ended)
        for job in ended[: max(0, len(ended) - self._kept)]:
            del self._jobs[job.id]
            try:
                await self._lane.run(self._records.remove, job.id)
            except OSError as error:
                log.error("training job %s cannot be removed from the disk: %s", job.id, error)


def entered(job: JobRecord) -> list[JobEventRecord]:
    """The events of a job that has entered its state, without numbers and times."""
    texts = []
    if job.error is not None:
        texts.append(f"{job.error.reason}: {job.error.message}")
    if job.result is not None and job.result.warning:
        texts.append(job.result.warning)
    return [*(JobEventRecord(message=text) for text in texts), JobEventRecord(state=job.state)]
