"""TrainingService: the queue of training jobs over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from loraplex.v1 import training_pb2, training_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal, Subject

from loraplex_server.access.principals import Principal, caller
from loraplex_server.rpc.calls.arriving import SILENCE_SECONDS, messages
from loraplex_server.rpc.calls.errors import for_client, invalid, require
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.peers import peer_address
from loraplex_server.rpc.messages import describe_training as describe
from loraplex_server.rpc.messages import validate_training as validate
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.rpc.services.upload_room import UploadRoom
from loraplex_server.training.files.record import DataUpload
from loraplex_server.training.jobs import JOB, JobRecord
from loraplex_server.training.queue import JobQueue

DEFAULT_PAGE: Final = 100
DEFAULT_EVENTS: Final = 1000

_DISCARDED_BYTES: Final = 64 << 20
_DISCARD_SECONDS: Final = 5.0

_DRAINING: Final = "the server is shutting down; send the file again when it is back"
_SILENCE: Final = f"nothing arrived for {SILENCE_SECONDS:g} s; send the file again"

_SETTING: Final = "training"

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """The service of loraplex/v1/training.proto. Without a queue it refuses every call.

    Jobs and files of other principals do not exist for a caller, unless it sees all adapters.
    """

    def __init__(
        self, queue: JobQueue | None, gate: CallGate, room: UploadRoom | None = None
    ) -> None:
        """`room` knows what principals may keep; None sets them no limit."""
        self._queue = queue
        self._gate = gate
        self._room = room

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

    async def ListJobEvents(
        self, request: training_pb2.ListJobEventsRequest, context: _Context
    ) -> training_pb2.ListJobEventsResponse:
        """Lists a page of a job's events."""
        with self._open(validate.events, request) as queue:
            size = request.page_size or DEFAULT_EVENTS
            terms = (size, int(request.page_token or 0), request.newest_first)
            found, after = await queue.events(request.job_id, caller().owner, *terms)
        token = str(after) if after else ""
        reply = training_pb2.ListJobEventsResponse(next_page_token=token)
        await extend_in_slices(reply.events, found, describe.event)
        return reply

    # files of examples

    async def UploadData(
        self,
        request_iterator: AsyncIterator[training_pb2.UploadDataRequest],
        context: _Context,
    ) -> training_pb2.UploadDataResponse:
        """Stores a file that arrives in chunks."""
        arriving = messages(request_iterator, self._gate, _DRAINING, _SILENCE)
        async with aclosing(arriving) as requests:
            first = await anext(requests, training_pb2.UploadDataRequest())
            with self._open(validate.start, first) as queue:
                principal, given = caller(), first.start
                upload = DataUpload(
                    owner=principal.name,
                    peer=principal.name or peer_address(str(context.peer())),
                    filename=given.filename,
                    request_id=given.request_id,
                    labels=dict(given.labels),
                )
                allowed = partial(self._require_allowed, principal)
                try:
                    record = await queue.data.receive(upload, _chunks(requests), allowed)
                except Refusal:
                    await _discard(requests)
                    raise
        return training_pb2.UploadDataResponse(file=describe.file(record))

    async def GetData(
        self, request: training_pb2.GetDataRequest, context: _Context
    ) -> training_pb2.GetDataResponse:
        """Describes an uploaded file."""
        with self._open(validate.data_id, request.data_id) as queue:
            record = queue.data.get(request.data_id, caller().owner)
        return training_pb2.GetDataResponse(file=describe.file(record))

    async def ListData(
        self, request: training_pb2.ListDataRequest, context: _Context
    ) -> training_pb2.ListDataResponse:
        """Lists a page of uploaded files, newest first."""
        with self._open(validate.data_page, request) as queue:
            size = request.page_size or DEFAULT_PAGE
            found, token = queue.data.page(size, request.page_token, caller().owner)
        reply = training_pb2.ListDataResponse(next_page_token=token)
        await extend_in_slices(reply.files, found, describe.file)
        return reply

    async def ReadData(
        self, request: training_pb2.ReadDataRequest, context: _Context
    ) -> AsyncGenerator[training_pb2.ReadDataResponse, None]:
        """Streams the bytes of an uploaded file."""
        with self._open(validate.data_id, request.data_id) as queue:
            record = queue.data.get(request.data_id, caller().owner)
            async with aclosing(queue.data.read(record)) as pieces:
                async for piece in pieces:
                    yield training_pb2.ReadDataResponse(chunk=piece)

    async def DeleteData(
        self, request: training_pb2.DeleteDataRequest, context: _Context
    ) -> training_pb2.DeleteDataResponse:
        """Deletes an uploaded file."""
        with self._open(validate.data_id, request.data_id) as queue:
            await queue.data.remove(request.data_id, caller().owner)
        return training_pb2.DeleteDataResponse()

    async def _require_allowed(self, principal: Principal, held: int, size: int) -> None:
        """Raises Refusal(QUOTA_EXCEEDED); see `shelf.Allowed`."""
        if self._room is not None:
            await self._room.require_any(principal, size, data_bytes=held)

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


async def _discard(requests: AsyncIterator[training_pb2.UploadDataRequest]) -> None:
    """Reads what a client still sends of a refused upload, within bounds.

    A client of grpc.aio whose call ends while it writes gets an error of its own, not the refusal.
    """
    left = _DISCARDED_BYTES
    with suppress(TimeoutError, Refusal):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for request in requests:
                left -= len(request.chunk)
                if left < 0:
                    return


async def _chunks(
    requests: AsyncIterator[training_pb2.UploadDataRequest],
) -> AsyncGenerator[bytes, None]:
    """The bytes of the messages after the first one. Raises Refusal(FIELD_INVALID)."""
    async for request in requests:
        require(validate.chunk(request))
        yield request.chunk
