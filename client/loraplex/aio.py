"""The asyncio client: the names, arguments, results and errors of `Client`, awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, Unpack

import grpc

from loraplex import channel, requests
from loraplex.access.options import AccessOptions
from loraplex.aio_streams import AsyncJobWatch, AsyncStream, AsyncWatch
from loraplex.calls import Calls
from loraplex.connection import AsyncConnection
from loraplex.jobs import JobCalls
from loraplex.requests import GenerateOptions
from loraplex.v1 import adapter_pb2, generation_pb2, training_pb2


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
        self._close = connection.close
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
        other._close = _nothing
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
        return AsyncStream(self._connection.stubs.generation.GenerateStream(request, **arguments))

    def watch_adapters(self, *, timeout: float | None = None) -> AsyncWatch:
        """Like `Client.watch_adapters`; not awaited itself."""
        request = adapter_pb2.WatchAdaptersRequest()
        arguments = self._connection.defaults.unbounded(timeout)
        return AsyncWatch(self._connection.stubs.adapters.WatchAdapters(request, **arguments))

    async def close(self) -> None:
        """Closes the connection; running calls are cancelled."""
        await self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _nothing() -> None:
    """The connection of another client is not closed."""


class AsyncTraining(JobCalls):
    """The calls of `Training`, awaited. Cancelling a task cancels its call, not the job."""

    def watch(self, job_id: str, *, timeout: float | None = None) -> AsyncJobWatch:
        """Like `Training.watch`; not awaited itself: `async for job in training.watch(...)`."""
        request = training_pb2.WatchJobRequest(job_id=job_id)
        arguments = self._connection.defaults.unbounded(timeout)
        return AsyncJobWatch(self._connection.stubs.training.WatchJob(request, **arguments))
