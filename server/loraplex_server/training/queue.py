"""The queue of training jobs: one runs, the others wait in order.

All state belongs to the event loop; files and processes are accessed in threads and by `Child`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.runtime.watched import WatchedTask
from loraplex_server.training.creation import JobFactory
from loraplex_server.training.files.folder import DataFolder
from loraplex_server.training.files.shelf import DataShelf, ShelfLimits
from loraplex_server.training.history.events import JobEventRecord
from loraplex_server.training.jobs import ADAPTER, JOB, FailureRecord, JobRecord, State
from loraplex_server.training.records import Records
from loraplex_server.training.request import JobRequest
from loraplex_server.training.runner import Destination, Halt, Runner
from loraplex_server.training.table import JobTable
from loraplex_server.training.trainer import Trainer

MAX_RESUMPTIONS: Final = 3
"""Number of restarts of a job under which the server died: the job may be the cause."""

MAX_CREATING: Final = 8
LOCK_SECONDS: Final = 1.0
"""Seconds between two attempts to take the jobs over from another server."""
_HANDOVER_SECONDS: Final = 5.0
_CANCEL_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class JobMetrics(Protocol):
    """Receives the numbers of jobs."""

    def training_jobs(self, queued: int, running: int) -> None:
        """Sets the numbers of jobs that wait and that run."""

    def training_ended(self, result: str, tokens: int) -> None:
        """Counts a job that has ended, and the tokens trained on since it last started."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Limits that the operator sets.

    Attributes:
        waiting: number of jobs that may wait.
        kept: number of jobs that are kept after their end.
        data_bytes: size of a file of examples.
        files, files_bytes: number of uploaded files, and their bytes together.
    """

    waiting: int
    kept: int
    data_bytes: int
    files: int = 1000
    files_bytes: int = 8 << 30


class JobQueue:
    """Queues and runs jobs. Call `open` before use; `stop` interrupts the job that runs."""

    def __init__(
        self,
        records: Records,
        trainer: Trainer,
        destination: Destination,
        metrics: JobMetrics,
        import_root: Path,
        limits: JobLimits,
    ) -> None:
        self._records = records
        self._trainer = trainer
        self._destination = destination
        self._metrics = metrics
        self._limits = limits
        bounds = ShelfLimits(limits.data_bytes, limits.files, limits.files_bytes)
        self._shelf = DataShelf(DataFolder(records.data), bounds, trainer.lane)
        self._factory = JobFactory(records, trainer, self._shelf, import_root, limits.data_bytes)
        self._table = JobTable(records, limits.kept, trainer.lane)
        self._waiting: deque[str] = deque()
        self._runner: Runner | None = None
        self._owned = False
        self._stopping = False
        self._creating = 0
        self._one_creation = asyncio.Lock()
        self._wake = asyncio.Event()
        self._worker: WatchedTask | None = None

    async def open(self) -> None:
        """Takes over the jobs on the disk and starts work. Retries while another server has them.

        Raises OSError if the directory cannot be used.
        """
        if not await self._own():
            log.warning("another server has the training jobs; waiting for it to end")
        self._worker = WatchedTask(self._work(), "training jobs")

    async def stop(self, patience: float) -> None:
        """Stops the trainer, which may save for `patience` seconds. Idempotent.

        Returns a few seconds after `patience` at the latest, even if the job cannot be stopped.

        The next `open` continues with the jobs that wait and the one that ran.
        """
        self._stopping = True
        if self._worker is not None:
            self._worker.release()
        self._wake.set()
        end = time.monotonic() + patience
        if self._runner is not None:
            await self._runner.halt(Halt.SHUTDOWN, patience)
        if self._worker is not None:
            # Only a delivery can still be running. If it hangs, the next `open` repeats it.
            left = max(0.0, end - time.monotonic())
            await asyncio.wait({self._worker.task}, timeout=left + _HANDOVER_SECONDS)
            self._worker.cancel()
            await asyncio.wait({self._worker.task}, timeout=_CANCEL_SECONDS)
            self._worker = None
        self._owned = False
        await self._trainer.lane.run(self._records.release)

    def get(self, job_id: str, owner: str | None = None) -> JobRecord:
        """Returns a job. Raises Refusal: JOB_NOT_FOUND, DRAINING, TRAINING_ELSEWHERE.

        Here and in other methods, jobs of others than `owner` do not exist; None stands for all.
        """
        self._require_owned()
        return self._table.get(job_id, owner)

    def page(
        self, size: int, before: str, states: Collection[State], owner: str | None = None
    ) -> tuple[Sequence[JobRecord], str]:
        """Returns a page of jobs; see `JobTable.page`. Raises Refusal as `get`."""
        self._require_owned()
        return self._table.page(size, before, states, owner)

    def watch(self, job_id: str, owner: str | None = None) -> AsyncGenerator[JobRecord, None]:
        """Yields a job's states; see `JobTable.watch`. Raises Refusal as `get`."""
        self._require_owned()
        return self._table.watch(job_id, self.position, owner)

    @property
    def data(self) -> DataShelf:
        """The uploaded files of examples. Raises Refusal: DRAINING, TRAINING_ELSEWHERE."""
        self._require_owned()
        return self._shelf

    def data_bytes(self, principal: str) -> int:
        """Returns the bytes of a principal's uploaded files."""
        return self._shelf.held_bytes(principal)

    async def events(
        self, job_id: str, owner: str | None, size: int, after: int, newest_first: bool
    ) -> tuple[Sequence[JobEventRecord], int]:
        """Returns a page of a job's events; see `JobHistories.page`. Raises Refusal as `get`."""
        job = self.get(job_id, owner)
        return await self._table.histories.page(job.id, size, after, newest_first)

    def position(self, job: JobRecord) -> int:
        """Returns the number of jobs before one that waits; 0 for a job that does not wait."""
        if job.state is not State.QUEUED or job.id not in self._waiting:
            return 0
        return self._waiting.index(job.id) + (self._runner is not None)

    async def create(self, request: JobRequest) -> tuple[JobRecord, bool]:
        """Checks and queues a job. Returns the existing one and False for a repeated request.

        Raises Refusal.
        """
        self._require_owned()
        if self._creating >= MAX_CREATING:
            text = f"{self._creating} jobs are being created already; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        self._creating += 1
        try:
            async with self._one_creation:
                known = self._known(request)
                if known is not None:
                    return known, False
                self._require_room(request)
                await self._destination.check(request.order, request.principal)
                return await self._create(request), True
        finally:
            self._creating -= 1

    async def cancel(self, job_id: str, owner: str | None = None) -> JobRecord:
        """Cancels a job and returns it once it has ended. Raises Refusal as `get`."""
        job, halting = self.get(job_id, owner), False
        while not job.final:
            if job_id in self._waiting:
                self._waiting.remove(job_id)
                await self._end(job.change(state=State.CANCELLED, ended=time.time()), 0)
            elif job.state is State.INTERRUPTED:
                raise Refusal(Reason.DRAINING, "the server is shutting down")
            else:
                if not halting and self._runner is not None and self._runner.job.id == job_id:
                    halting = True
                    halt = self._runner.halt(Halt.CANCELLED, self._trainer.patience)
                    await asyncio.shield(asyncio.create_task(halt))
                # A job that is being queued, or has ended without being recorded yet, changes soon.
                if not self._table.get(job_id).final:
                    await self._table.change()
            job = self._table.get(job_id)
        return job

    def _known(self, request: JobRequest) -> JobRecord | None:
        """Returns the job of an earlier request with the same id. Raises Refusal(JOB_CONFLICT)."""
        if not request.request_id:
            return None
        content = request.content()
        for job in self._table:
            if job.request_id == request.request_id and job.owner.name == request.principal.name:
                if job.content == content:
                    return job
                text = f"the request id was used for training job {job.id} with other contents"
                raise Refusal(Reason.JOB_CONFLICT, text, subject=Subject(JOB, job.id))
        return None

    def _require_room(self, request: JobRequest) -> None:
        order = request.order
        if len(self._waiting) >= self._limits.waiting + (self._runner is None):
            text = f"{len(self._waiting)} training jobs wait already"
            raise Refusal(Reason.JOB_QUEUE_FULL, text, subject=Subject(JOB, "training_max_jobs"))
        for job in self._table:
            if not job.final and job.order.name == order.name and not order.replace:
                if not job.is_of(request.principal.owner):
                    text = f"{order.name} is not available to this caller"
                    raise Refusal(Reason.PERMISSION_DENIED, text)
                text = f"training job {job.id} makes an adapter of that name; set `replace`"
                raise Refusal(Reason.ADAPTER_CONFLICT, text, subject=Subject(ADAPTER, order.name))

    async def _create(self, request: JobRequest) -> JobRecord:
        held_bytes = self._runner.job.estimated_bytes if self._runner else 0
        job = await self._factory.create(
            request, self._table.newest_id(), held_bytes, self._require_owned
        )
        await self._table.add(job)
        self._waiting.append(job.id)
        self._wake.set()
        self._count()
        log.info("training job %s is queued: %s", job.id, request.order.name)
        return job

    async def _work(self) -> None:
        while not self._owned and not self._stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOCK_SECONDS)
            try:
                if not self._stopping and await self._own():
                    log.info("this server has taken over the training jobs")
            except OSError as error:
                log.error("the training jobs cannot be read: %s", error)
        while not self._stopping:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._run(self._table.get(self._waiting.popleft()))

    async def _own(self) -> bool:
        """Takes the jobs over. Returns False if another server has them. Raises OSError."""
        if not await self._trainer.lane.run(self._records.acquire):
            return False
        try:
            await self._load()
        except BaseException:
            self._records.release()
            raise
        self._owned = True
        return True

    async def _load(self) -> None:
        """Loads the jobs and queues them: first those that ran before, then those that waited."""
        await self._shelf.load()
        jobs = await self._table.load()
        for job in jobs:
            if job.state not in {State.RUNNING, State.INTERRUPTED}:
                continue
            died = job.state is State.RUNNING
            count = job.resumptions + died
            if count > MAX_RESUMPTIONS:
                text = (
                    f"the server ended {count} times while this job ran, so it is not started "
                    "again; its last checkpoint is kept, for `loraplex-train resume`"
                )
                error = FailureRecord(Reason.INTERRUPTED, text)
                failed = job.change(state=State.FAILED, ended=time.time(), error=error)
                await self._end(failed, 0)
                continue
            await self._table.publish(job.change(state=State.QUEUED, resumptions=count))
            self._waiting.append(job.id)
        self._waiting.extend(job.id for job in jobs if job.state is State.QUEUED)
        self._wake.set()
        self._count()

    async def _run(self, job: JobRecord) -> None:
        folder = self._records.folder(job.id)
        publish, history = self._table.publish, self._table.histories.of(job.id)
        runner = Runner(job, folder, self._trainer, self._destination, publish, history)
        self._runner = runner
        self._count()
        self._table.wake()
        try:
            done = await runner.run()
        except Exception:
            log.exception("training job %s: the server failed", job.id)
            error = FailureRecord(Reason.ENGINE_FAULT, "internal error")
            done = runner.job.change(state=State.FAILED, ended=time.time(), error=error)
        finally:
            self._runner = None
        if done.final:
            await self._end(done, runner.tokens)
        else:
            await self._table.publish(done)

    async def _end(self, job: JobRecord, tokens: int) -> None:
        await self._table.publish(job)
        self._metrics.training_ended(job.state.value, tokens)
        self._count()
        self._table.wake()
        why = f": {job.error.reason}: {job.error.message}" if job.error else ""
        log.info("training job %s has %s%s", job.id, job.state.value, why)
        await self._table.forget_old()

    def _count(self) -> None:
        self._metrics.training_jobs(len(self._waiting), int(self._runner is not None))

    def _require_owned(self) -> None:
        if self._stopping:
            raise Refusal(Reason.DRAINING, "the server is shutting down")
        if not self._owned:
            text = "another server still runs the training jobs"
            raise Refusal(Reason.TRAINING_ELSEWHERE, text)
