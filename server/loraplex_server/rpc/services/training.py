"""TrainingService: the queue of training jobs over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Final, TypeVar

import grpc
from loraplex.v1 import training_pb2, training_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.access.principals import caller
from loraplex_server.rpc.calls.errors import for_client, invalid
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.messages import describe_training as describe
from loraplex_server.rpc.messages import validate_training as validate
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.training.jobs import JOB, JobRecord
from loraplex_server.training.queue import JobQueue

DEFAULT_PAGE: Final = 100

_SETTING: Final = "training"

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """The service of loraplex/v1/training.proto. Without a queue it refuses every call.

    Jobs of other principals do not exist for a caller, unless it sees all adapters.
    """

    def __init__(self, queue: JobQueue | None, gate: CallGate) -> None:
        self._queue = queue
        self._gate = gate

    async def CreateJob(
        self, request: training_pb2.CreateJobRequest, context: _Context
    ) -> training_pb2.CreateJobResponse:
        """Checks and queues a job."""
        with self._open(validate.create, request) as queue:
            job, created = await queue.create(describe.request(request, caller()))
        return training_pb2.CreateJobResponse(job=self._describe(job), created=created)

    async def GetJob(
        self, request: training_pb2.GetJobRequest, context: _Context
    ) -> training_pb2.GetJobResponse:
        """Describes one job."""
        with self._open(validate.job_id, request.job_id) as queue:
            job = queue.get(request.job_id, caller().owner)
            return training_pb2.GetJobResponse(job=self._describe(job))

    async def ListJobs(
        self, request: training_pb2.ListJobsRequest, context: _Context
    ) -> training_pb2.ListJobsResponse:
        """Lists a page of jobs, newest first."""
        with self._open(validate.page, request) as queue:
            size = request.page_size or DEFAULT_PAGE
            terms = (size, request.page_token, describe.states(request))
            found, token = queue.page(*terms, caller().owner)
        reply = training_pb2.ListJobsResponse(next_page_token=token)
        await extend_in_slices(reply.jobs, found, self._describe)
        return reply

    async def CancelJob(
        self, request: training_pb2.CancelJobRequest, context: _Context
    ) -> training_pb2.CancelJobResponse:
        """Cancels a job."""
        with self._open(validate.job_id, request.job_id) as queue:
            job = await queue.cancel(request.job_id, caller().owner)
        return training_pb2.CancelJobResponse(job=self._describe(job))

    async def WatchJob(
        self, request: training_pb2.WatchJobRequest, context: _Context
    ) -> AsyncGenerator[training_pb2.WatchJobResponse, None]:
        """Streams the job now and after each change, until it has ended."""
        draining = "the server is shutting down; the job continues later"
        with self._open(validate.job_id, request.job_id) as queue:
            async with aclosing(queue.watch(request.job_id, caller().owner)) as changes:
                while job := await self._gate.before_draining(anext(changes, None), draining):
                    yield training_pb2.WatchJobResponse(job=self._describe(job))
                    if job.final:
                        return
        raise Refusal(Reason.DRAINING, draining)

    @contextmanager
    def _open(self, problems: Callable[[T], list[Problem]], checked: T) -> Iterator[JobQueue]:
        """Provides the queue for a request of which `problems` finds none.

        The queue's refusals become those that the client sees, with paths of the request as fields.
        """
        if self._queue is None:
            text = "training is off on this server; its operator turns it on with --training"
            raise Refusal(
                Reason.TRAINING_DISABLED, text, subject=Subject("loraplex.Setting", _SETTING)
            )
        if found := problems(checked):
            raise invalid(found)
        try:
            yield self._queue
        except Refusal as refusal:
            if refusal.reason is not Reason.FIELD_INVALID:
                raise for_client(refusal, Subject(JOB)) from refusal
            found = [Problem(describe.path(p), p.message) for p in refusal.problems]
            raise invalid(found) from refusal

    def _describe(self, job: JobRecord) -> training_pb2.TrainingJob:
        return describe.job(job, self._queue.position(job) if self._queue else 0)
