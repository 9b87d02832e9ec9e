"""`client.training` of the asyncio client: the names and arguments of `Training`, awaited."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias, TypeVar, Unpack

import grpc

from loraplex import channel, training
from loraplex.aio_streams import AsyncCall
from loraplex.errors import from_rpc_error
from loraplex.training import JobState, TrainingJob, TrainingOptions
from loraplex.v1 import training_pb2, training_pb2_grpc

R = TypeVar("R")

_Jobs: TypeAlias = list[TrainingJob]  # "list" is a method below


class AsyncJobWatch(AsyncCall[training_pb2.WatchJobResponse]):
    """See `JobWatch`: the same members, with `async for`."""

    def __aiter__(self) -> AsyncIterator[TrainingJob]:
        return self

    async def __anext__(self) -> TrainingJob:
        message = await self._message()
        if message is None:
            raise StopAsyncIteration
        return training.job(message.job)


class AsyncTraining:
    """See `Training`. Cancelling a task cancels its call, not the job."""

    def __init__(self, connection: grpc.aio.Channel, defaults: channel.CallDefaults) -> None:
        stub: Any = training_pb2_grpc.TrainingServiceStub(connection)
        self._stub: training_pb2_grpc.TrainingServiceAsyncStub = stub
        self._defaults = defaults

    async def create(
        self,
        name: str,
        data: bytes | str | os.PathLike[str] | None = None,
        *,
        server_path: str = "",
        eval_data: bytes | str | os.PathLike[str] | None = None,
        eval_server_path: str = "",
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[TrainingOptions],
    ) -> TrainingJob:
        """See `Training.create`."""
        request = await asyncio.to_thread(
            training.create,
            *(name, data, server_path, eval_data, eval_server_path, request_id, options),
        )
        return training.job((await self._call(self._stub.CreateJob, request, timeout)).job)

    async def get(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """See `Training.get`."""
        request = training_pb2.GetJobRequest(job_id=job_id)
        return training.job((await self._call(self._stub.GetJob, request, timeout)).job)

    async def list(
        self,
        *,
        states: Sequence[JobState | str] = (),
        page_size: int = 0,
        timeout: float | None = None,
    ) -> _Jobs:
        """See `Training.list`."""
        found: list[TrainingJob] = []
        token = ""
        while True:
            request = training.page(page_size, token, states)
            reply = await self._call(self._stub.ListJobs, request, timeout)
            found += map(training.job, reply.jobs)
            token = reply.next_page_token
            if not token:
                return found

    async def cancel(self, job_id: str, *, timeout: float | None = None) -> TrainingJob:
        """See `Training.cancel`."""
        request = training_pb2.CancelJobRequest(job_id=job_id)
        return training.job((await self._call(self._stub.CancelJob, request, timeout)).job)

    def watch(self, job_id: str, *, timeout: float | None = None) -> AsyncJobWatch:
        """See `Training.watch`; not awaited itself: `async for job in training.watch(...)`."""
        request = training_pb2.WatchJobRequest(job_id=job_id)
        return AsyncJobWatch(self._stub.WatchJob(request, **self._defaults.unbounded(timeout)))

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, R],
        request: Any,
        timeout: float | None,
    ) -> R:
        try:
            return await method(request, **self._defaults.arguments(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
