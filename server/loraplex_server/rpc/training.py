"""TrainingService: the queue of training jobs over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import grpc
from loraplex.v1 import training_pb2, training_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.rpc import describe_training as describe
from loraplex_server.rpc import validate_training as validate
from loraplex_server.rpc.errors import for_client, invalid
from loraplex_server.rpc.interceptor import Gate
from loraplex_server.training.jobs import JOB, JobRecord
from loraplex_server.training.queue import JobQueue

DEFAULT_PAGE: Final = 100

_SETTING: Final = "training"

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """The service of loraplex/v1/training.proto. Without a queue it refuses every call."""

    def __init__(self, queue: JobQueue | None, gate: Gate) -> None:
        self._queue = queue
        self._gate = gate

    async def CreateJob(
        self, request: training_pb2.CreateJobRequest, context: _Context
    ) -> training_pb2.CreateJobResponse:
        """Checks and queues a job."""
        queue = self._on()
        _require(validate.create(request))
        job, created = await _typed(queue.create(describe.request(request)))
        return training_pb2.CreateJobResponse(job=self._describe(job), created=created)

    async def GetJob(
        self, request: training_pb2.GetJobRequest, context: _Context
    ) -> training_pb2.GetJobResponse:
        """Describes one job."""
        queue = self._on()
        _require(validate.job_id(request.job_id))
        try:
            return training_pb2.GetJobResponse(job=self._describe(queue.get(request.job_id)))
        except Refusal as refusal:
            raise _error(refusal) from refusal

    async def ListJobs(
        self, request: training_pb2.ListJobsRequest, context: _Context
    ) -> training_pb2.ListJobsResponse:
        """Lists a page of jobs, newest first."""
        queue = self._on()
        _require(validate.page(request))
        size = request.page_size or DEFAULT_PAGE
        try:
            found, token = queue.page(size, request.page_token, describe.states(request))
        except Refusal as refusal:
            raise _error(refusal) from refusal
        jobs = [self._describe(job) for job in found]
        return training_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def CancelJob(
        self, request: training_pb2.CancelJobRequest, context: _Context
    ) -> training_pb2.CancelJobResponse:
        """Cancels a job."""
        queue = self._on()
        _require(validate.job_id(request.job_id))
        job = await _typed(queue.cancel(request.job_id))
        return training_pb2.CancelJobResponse(job=self._describe(job))

    async def WatchJob(
        self, request: training_pb2.WatchJobRequest, context: _Context
    ) -> AsyncGenerator[training_pb2.WatchJobResponse, None]:
        """Streams the job now and after each change, until it has ended."""
        queue = self._on()
        _require(validate.job_id(request.job_id))
        closing = asyncio.ensure_future(self._gate.closing())
        try:
            async with aclosing(queue.watch(request.job_id)) as changes:
                while (job := await _next(changes, closing)) is not None:
                    yield training_pb2.WatchJobResponse(job=self._describe(job))
                    if job.final:
                        return
        except Refusal as refusal:
            raise _error(refusal) from refusal
        finally:
            closing.cancel()
        raise Refusal(Reason.DRAINING, "the server is shutting down; the job continues later")

    def _on(self) -> JobQueue:
        if self._queue is None:
            text = "training is off on this server; its operator turns it on with --training"
            raise Refusal(
                Reason.TRAINING_DISABLED, text, subject=Subject("loraplex.Setting", _SETTING)
            )
        return self._queue

    def _describe(self, job: JobRecord) -> training_pb2.TrainingJob:
        return describe.job(job, self._queue.position(job) if self._queue else 0)


async def _next(
    changes: AsyncGenerator[JobRecord, None], closing: asyncio.Future[None]
) -> JobRecord | None:
    """Returns the next state of a job; None once the server drains."""
    coming = asyncio.ensure_future(anext(changes, None))
    both: set[asyncio.Future[Any]] = {coming, closing}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.wait({coming})


def _require(violations: list[Problem]) -> None:
    if violations:
        raise invalid(violations)


async def _typed(work: Awaitable[T]) -> T:
    try:
        return await work
    except Refusal as refusal:
        raise _error(refusal) from refusal


def _error(refusal: Refusal) -> Refusal:
    """Returns the refusal as the client sees it, with paths of the request as fields."""
    if refusal.reason is Reason.FIELD_INVALID:
        return invalid([Problem(describe.path(p), p.message) for p in refusal.problems])
    return for_client(refusal, Subject(JOB))
