"""The jobs and their order: one runs, the others wait; whoever watches sees each change.

All state is touched on the event loop only; files and processes are behind threads and `Child`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
from loraplex_model.base.refusal import Reason, Refusal, Subject

from loraplex_server.training import data as job_data
from loraplex_server.training.jobs import ADAPTER, JOB, Error, Job, Order, State
from loraplex_server.training.records import Records
from loraplex_server.training.runner import Destination, Halt, Runner
from loraplex_server.training.trainer import CONFIG, DATA, EVAL_DATA, Trainer

MAX_RESUMPTIONS: Final = 3
"""How often a job is begun again after the server died under it: it may be what kills it."""

MAX_CREATING: Final = 8
MAX_WATCHERS: Final = 64
WATCH_SECONDS: Final = 0.1
"""The least time between two states that one watcher is told."""

LOCK_SECONDS: Final = 1.0
_HANDOVER_SECONDS: Final = 5.0

log = logging.getLogger(__name__)


class Numbers(Protocol):
    """Who counts the jobs."""

    def training_jobs(self, queued: int, running: int) -> None:
        """How many there are now."""

    def training_ended(self, result: str, tokens: int) -> None:
        """A job has ended for good; `tokens` were trained on since it was last begun."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where examples are: the bytes, or a path below the import root; `field` of the request."""

    field: str
    jsonl: bytes = b""
    path: str = ""

    def identity(self) -> list[str]:
        """What makes two of them the same."""
        return [self.path, hashlib.sha256(self.jsonl).hexdigest()]


@dataclass(frozen=True, slots=True)
class Request:
    """All that a client asked for."""

    order: Order
    data: Source
    eval_data: Source | None = None
    request_id: str = ""

    def content(self) -> str:
        """The digest of what was asked."""
        parts = [self.data.identity(), self.eval_data.identity() if self.eval_data else None]
        text = msgspec.json.encode([self.order, parts], order="deterministic")
        return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the operator allows: jobs that wait, jobs that are remembered, bytes of a data file."""

    waiting: int
    kept: int
    data_bytes: int


class JobQueue:
    """See the module. `open` before use; `stop` ends the job that runs, so that it can go on."""

    def __init__(
        self,
        records: Records,
        trainer: Trainer,
        destination: Destination,
        numbers: Numbers,
        import_root: Path,
        bounds: Bounds,
    ) -> None:
        self._records = records
        self._trainer = trainer
        self._destination = destination
        self._numbers = numbers
        self._import_root = import_root
        self._bounds = bounds
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[str] = deque()
        self._runner: Runner | None = None
        self._owned = False
        self._stopping = False
        self._creating = 0
        self._making = asyncio.Lock()
        self._wake = asyncio.Event()
        self._news: dict[str, asyncio.Event] = {}
        self._watchers = 0
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Takes up the jobs there are. While another server has them, tries again and again.

        Raises OSError where the folder cannot be used.
        """
        if not await self._own():
            log.warning("another server has the training jobs; waiting for it to end")
        self._worker = asyncio.create_task(self._work(), name="training jobs")

    async def stop(self, patience: float) -> None:
        """Ends the trainer, which may save for `patience` seconds, and starts no other. Idempotent.

        What was queued or running is taken up again by the next `open`.
        """
        self._stopping = True
        self._wake.set()
        if self._runner is not None:
            await self._runner.halt(Halt.SHUTDOWN, patience)
        if self._worker is not None:
            # What is left is a hand-over: if that hangs, the next `open` does it again.
            await asyncio.wait({self._worker}, timeout=patience + _HANDOVER_SECONDS)
            self._worker.cancel()
            await asyncio.wait({self._worker})
            self._worker = None
        self._owned = False
        await asyncio.to_thread(self._records.release)

    # what there is

    def get(self, job_id: str) -> Job:
        """One job. Raises Refusal(JOB_NOT_FOUND)."""
        self._require_owned()
        job = self._jobs.get(job_id)
        if job is None:
            raise Refusal(
                Reason.JOB_NOT_FOUND, "there is no such training job", subject=Subject(JOB, job_id)
            )
        return job

    def position(self, job: Job) -> int:
        """How many jobs run or wait before one that waits; 0 for others."""
        if job.state is not State.QUEUED or job.id not in self._waiting:
            return 0
        return self._waiting.index(job.id) + (self._runner is not None)

    def page(self, size: int, before: str, states: Collection[State]) -> tuple[Sequence[Job], str]:
        """At most `size` jobs older than the id `before` ("" is no bound), the newest first.

        With it comes the last one's id, or "" if there are no more.
        """
        self._require_owned()
        found = [
            job
            for job_id, job in sorted(self._jobs.items(), reverse=True)
            if (not before or job_id < before) and (not states or job.state in states)
        ]
        return found[:size], found[size - 1].id if len(found) > size else ""

    async def watch(self, job_id: str) -> AsyncGenerator[Job, None]:
        """The job now and after each change, the last time when it has ended or is interrupted.

        A slow reader is given the newest state only. Raises Refusal: JOB_NOT_FOUND, OVERLOADED.
        """
        job = self.get(job_id)
        if self._watchers >= MAX_WATCHERS:
            raise Refusal(
                Reason.OVERLOADED, f"{self._watchers} calls watch already; try again later"
            )
        self._watchers += 1
        try:
            while True:
                place = self.position(job)
                yield job
                if job.final or job.state is State.INTERRUPTED:
                    return
                await asyncio.sleep(WATCH_SECONDS)
                while self._jobs.get(job_id) is job and self.position(job) == place:
                    await self._changed(job_id)
                job = self._jobs.get(job_id, job)
        finally:
            self._watchers -= 1

    # changes

    async def create(self, request: Request) -> tuple[Job, bool]:
        """Checks and queues a job; the one there is, and False, if it was asked for before.

        Raises Refusal.
        """
        self._require_owned()
        if self._creating >= MAX_CREATING:
            raise Refusal(Reason.OVERLOADED, f"{self._creating} jobs are being created; try again")
        self._creating += 1
        try:
            async with self._making:
                known = self._known(request)
                if known is not None:
                    return known, False
                self._require_room(request.order)
                await self._destination.check(request.order)
                return await self._create(request), True
        finally:
            self._creating -= 1

    async def cancel(self, job_id: str) -> Job:
        """Ends a job; the job, ended. Raises Refusal(JOB_NOT_FOUND)."""
        job = self.get(job_id)
        if job_id in self._waiting:
            self._waiting.remove(job_id)
            await self._end(job.change(state=State.CANCELLED, ended=time.time()), 0)
        elif self._runner is not None and self._runner.job.id == job_id:
            halting = self._runner.halt(Halt.CANCELLED, self._trainer.patience)
            await asyncio.shield(asyncio.create_task(halting))
            while not self._jobs[job_id].final:
                if self._jobs[job_id].state is State.INTERRUPTED:
                    raise Refusal(Reason.DRAINING, "the server is shutting down")
                await self._changed(job_id)
        return self._jobs.get(job_id, job)

    # creation

    def _known(self, request: Request) -> Job | None:
        if not request.request_id:
            return None
        content = request.content()
        for job in self._jobs.values():
            if job.request_id == request.request_id:
                if job.content == content:
                    return job
                text = f"the request id was used for training job {job.id}, which is another"
                raise Refusal(Reason.JOB_CONFLICT, text, subject=Subject(JOB, job.id))
        return None

    def _require_room(self, order: Order) -> None:
        if len(self._waiting) >= self._bounds.waiting + (self._runner is None):
            text = f"{len(self._waiting)} training jobs wait already"
            raise Refusal(Reason.JOB_QUEUE_FULL, text, subject=Subject(JOB, "training_max_jobs"))
        for job in self._jobs.values():
            if not job.final and job.order.name == order.name and not order.replace:
                text = f"training job {job.id} makes an adapter of that name; set `replace`"
                raise Refusal(Reason.ADAPTER_CONFLICT, text, subject=Subject(ADAPTER, order.name))

    async def _create(self, request: Request) -> Job:
        job_id = self._new_id()
        async with self._folder(job_id) as folder:
            await asyncio.to_thread(self._write, request, folder)
            plan = await self._trainer.plan(folder)
            self._trainer.require(plan, self._runner.job.estimated_bytes if self._runner else 0)
            if self._stopping:
                raise Refusal(Reason.DRAINING, "the server is shutting down")
            job = Job(
                id=job_id,
                order=request.order,
                request_id=request.request_id,
                content=request.content(),
                created=time.time(),
                estimated_bytes=plan.bytes,
            )
            await asyncio.to_thread(self._records.save, job)
        self._jobs[job_id] = job
        self._waiting.append(job_id)
        self._wake.set()
        self._count()
        log.info("training job %s is queued: %s", job_id, request.order.name)
        return job

    def _write(self, request: Request, folder: Path) -> None:
        """The job's files: its configuration, then copies of its data. Blocks."""
        evaluated = request.eval_data is not None
        configuration = self._trainer.configuration(request.order, folder, evaluated)
        (folder / CONFIG).write_text(configuration, "utf-8")
        for source, name in ((request.data, DATA), (request.eval_data, EVAL_DATA)):
            if source is None:
                continue
            if source.path:
                limit = self._bounds.data_bytes
                field = f"{source.field}.path"
                job_data.copy(self._import_root, source.path, folder / name, limit, field)
            else:
                job_data.write(folder / name, source.jsonl)

    @asynccontextmanager
    async def _folder(self, job_id: str) -> AsyncGenerator[Path, None]:
        """A new job's folder, which is gone again if it comes to nothing."""
        try:
            yield await asyncio.to_thread(self._records.make, job_id)
        except BaseException as error:
            removing = asyncio.create_task(asyncio.to_thread(self._records.remove, job_id))
            await asyncio.shield(removing)
            if isinstance(error, OSError):
                log.error("a training job cannot be kept: %s", error)
                raise job_data.from_os_error(error) from error
            raise

    def _new_id(self) -> str:
        last = max(self._jobs, default="0" * 12)[:12]
        number = max(time.time_ns() // 1_000_000, int(last, 16) + 1)
        return f"{number:012x}-{secrets.token_hex(4)}"

    # the work

    async def _work(self) -> None:
        while not self._owned and not self._stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOCK_SECONDS)
            try:
                if not self._stopping and await self._own():
                    log.info("the training jobs are ours now")
            except OSError as error:
                log.error("the training jobs cannot be read: %s", error)
        while not self._stopping:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._run(self._jobs[self._waiting.popleft()])

    async def _own(self) -> bool:
        """Takes the jobs, unless another server has them. Raises OSError."""
        if not await asyncio.to_thread(self._records.acquire):
            return False
        try:
            await self._take_up()
        except BaseException:
            self._records.release()
            raise
        self._owned = True
        return True

    async def _take_up(self) -> None:
        jobs = await asyncio.to_thread(self._records.load)
        self._jobs = {job.id: job for job in jobs}
        begun = [job for job in jobs if job.state in {State.RUNNING, State.INTERRUPTED}]
        queued = [job for job in jobs if job.state is State.QUEUED]
        for job in begun:
            died = job.state is State.RUNNING
            count = job.resumptions + died
            if count > MAX_RESUMPTIONS:
                text = (
                    f"the server ended {count} times while this job ran, so it is not begun again; "
                    "its last checkpoint is kept with the job, for `loraplex-train resume`"
                )
                failed = job.change(
                    state=State.FAILED, ended=time.time(), error=Error("INTERRUPTED", text)
                )
                await self._end(failed, 0)
                continue
            again = job.change(state=State.QUEUED, resumptions=count)
            await self._keep(again)
            self._waiting.append(job.id)
        self._waiting.extend(job.id for job in queued)
        self._wake.set()
        self._count()

    async def _run(self, job: Job) -> None:
        folder = self._records.folder(job.id)
        runner = Runner(job, folder, self._trainer, self._destination, self._update)
        self._runner = runner
        self._count()
        self._tell_all()
        try:
            done = await runner.run()
        except Exception:
            log.exception("training job %s: the server failed", job.id)
            fault = Error("ENGINE_FAULT", "internal error")
            done = runner.job.change(state=State.FAILED, ended=time.time(), error=fault)
        finally:
            self._runner = None
        if done.final:
            await self._end(done, runner.tokens)
        else:
            await self._keep(done)

    async def _end(self, job: Job, tokens: int) -> None:
        await self._keep(job)
        self._numbers.training_ended(job.state.value, tokens)
        self._count()
        self._tell_all()
        why = f": {job.error.reason}: {job.error.message}" if job.error else ""
        log.info("training job %s has %s%s", job.id, job.state.value, why)
        ended = sorted(job_id for job_id, other in self._jobs.items() if other.final)
        for job_id in ended[: max(0, len(ended) - self._bounds.kept)]:
            del self._jobs[job_id]
            await asyncio.to_thread(self._records.remove, job_id)

    async def _update(self, job: Job, keep: bool) -> None:
        if keep:
            await self._keep(job)
        else:
            self._set(job)

    async def _keep(self, job: Job) -> None:
        """On disk first, then for all to see."""
        try:
            await asyncio.to_thread(self._records.save, job)
        except OSError as error:
            log.error("the record of training job %s cannot be written: %s", job.id, error)
        self._set(job)

    def _set(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._tell(job.id)

    def _tell(self, job_id: str) -> None:
        news = self._news.pop(job_id, None)
        if news is not None:
            news.set()

    def _tell_all(self) -> None:
        """The places in the queue are others."""
        for job_id in list(self._news):
            self._tell(job_id)

    async def _changed(self, job_id: str) -> None:
        await self._news.setdefault(job_id, asyncio.Event()).wait()

    def _count(self) -> None:
        self._numbers.training_jobs(len(self._waiting), int(self._runner is not None))

    def _require_owned(self) -> None:
        if self._stopping:
            raise Refusal(Reason.DRAINING, "the server is shutting down")
        if not self._owned:
            text = "another server still looks after the training jobs"
            raise Refusal(Reason.TRAINING_ELSEWHERE, text)
