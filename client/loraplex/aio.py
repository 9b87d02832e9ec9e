"""The asyncio client: the names, arguments, results and errors of `Client`, awaited."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc

from loraplex import channel, requests
from loraplex.access.options import AccessOptions
from loraplex.aio_streams import AsyncDataReading, AsyncJobWatch, AsyncStream, AsyncWatch
from loraplex.calls import Calls
from loraplex.connection import AsyncConnection
from loraplex.errors import from_rpc_error
from loraplex.jobs import data as data_files
from loraplex.jobs.calls import JobCalls
from loraplex.jobs.data import DataFile
from loraplex.replies import read
from loraplex.requests import GenerateOptions
from loraplex.v1 import adapter_pb2, generation_pb2, training_pb2
from loraplex.views import embedding
from loraplex.views.engine import AsyncEngineWatch, watch_request


class AsyncClient(Calls):
    """A connection to a server for one event loop: the one that runs at its first call.

    The arguments are those of `Client`. Cancelling a task cancels its call on the server too.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        timeout: float | None = channel.DEFAULT_TIMEOUT,
        wait_for_ready: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        **access: Unpack[AccessOptions],
    ) -> None:
        self._use(AsyncConnection(target, timeout, wait_for_ready, credentials, metadata, access))

    def _use(self, connection: AsyncConnection) -> None:
        super().__init__(connection)
        self._own = connection
        self.training = AsyncTraining(connection)

    def for_caller(self, key: str, metadata: channel.Metadata = ()) -> AsyncClient:
        """Returns a client whose calls carry the key of somebody else, over this connection.

        For programs that stand between callers and a server. `key` is a key or a signed token, ""
        for none; this client's own is not sent. `metadata` is sent in addition to this client's.
        The connection is closed by this client alone. Raises InvalidRequest if a key would leave
        this machine unencrypted.
        """
        other = object.__new__(AsyncClient)
        other._use(self._own.for_caller(key, metadata))
        return other

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Like `Client.stream`; not awaited itself: `async for delta in client.stream(...)`."""
        request = generation_pb2.GenerateStreamRequest(request=requests.generate(prompt, **options))
        arguments = self._connection.defaults.arguments(timeout)
        call = self._connection.stubs.generation.GenerateStream(request, **arguments)
        return AsyncStream(call, request.request.n)

    def watch_adapters(self, *, timeout: float | None = None) -> AsyncWatch:
        """Like `Client.watch_adapters`; not awaited itself."""
        request = adapter_pb2.WatchAdaptersRequest()
        arguments = self._connection.defaults.unbounded(timeout)
        return AsyncWatch(self._connection.stubs.adapters.WatchAdapters(request, **arguments))

    embed = embedding.embed

    def watch_engine(
        self, interval: float | None = None, *, timeout: float | None = None
    ) -> AsyncEngineWatch:
        """Like `Client.watch_engine`; not awaited itself."""
        arguments = self._connection.defaults.unbounded(timeout)
        method = self._connection.stubs.engine.WatchEngine
        return AsyncEngineWatch(method(watch_request(interval), **arguments))

    async def close(self) -> None:
        """Closes the connection; running calls are cancelled."""
        await self._own.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncTraining(JobCalls):
    """The calls of `Training`, awaited. Cancelling a task cancels its call, not the job."""

    def watch(self, job_id: str, *, timeout: float | None = None) -> AsyncJobWatch:
        """Like `Training.watch`; not awaited itself: `async for job in training.watch(...)`."""
        request = training_pb2.WatchJobRequest(job_id=job_id)
        arguments = self._connection.defaults.unbounded(timeout)
        return AsyncJobWatch(self._connection.stubs.training.WatchJob(request, **arguments))

    def read_data(self, data_id: str, *, timeout: float | None = None) -> AsyncDataReading:
        """Like `Training.read_data`; not awaited itself."""
        request = training_pb2.ReadDataRequest(data_id=data_id)
        arguments = self._connection.defaults.unbounded(timeout)
        return AsyncDataReading(self._connection.stubs.training.ReadData(request, **arguments))

    async def forward_data(
        self,
        pieces: AsyncIterable[bytes],
        *,
        filename: str = "",
        labels: Mapping[str, str] | None = None,
        request_id: str = "",
        timeout: float | None = None,
    ) -> DataFile:
        """Like `upload_data`, for bytes that arrive from elsewhere while they are sent.

        If `pieces` raises, the upload ends, nothing is stored, and the error is raised here.
        """
        head = data_files.start(filename, request_id, labels)
        failed: list[BaseException] = []

        async def guarded() -> AsyncIterator[training_pb2.UploadDataRequest]:
            try:
                async for message in data_files.arriving(head, pieces):
                    yield message
            except Exception as error:
                failed.append(error)
                call.cancel()
                raise

        arguments = self._connection.defaults.unbounded(timeout)
        call: Any = self._connection.stubs.training.UploadData(guarded(), **arguments)
        try:
            reply = await call
        except asyncio.CancelledError:
            if failed:
                raise failed[0] from None
            raise
        except grpc.RpcError as error:
            raise (failed[0] if failed else from_rpc_error(error)) from error
        return read(DataFile, reply.file)
