"""The asyncio client: the names, arguments, results and errors of `Client`, awaited."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import channel, replies, requests
from loraplex.errors import cancelled_here, from_rpc_error
from loraplex.requests import GenerateOptions
from loraplex.results import (
    AdapterInfo,
    Completion,
    Delta,
    Finished,
    HealthStatus,
    Registration,
    Started,
)
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc

Q = TypeVar("Q")
R = TypeVar("R")


class AsyncClient:
    """A connection to a server for one event loop: the one that runs at its first call.

    Arguments as for `Client`.
    """

    def __init__(
        self,
        target: str = channel.DEFAULT_TARGET,
        *,
        timeout: float | None = channel.DEFAULT_TIMEOUT,
        wait_for_ready: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        self._defaults = channel.call_defaults(timeout, wait_for_ready, metadata)
        self._target = target
        self._credentials = credentials

    async def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """See `Client.generate`. Cancelling the task cancels the call."""
        request = requests.generate(prompt, **options)
        return replies.completion(await self._call(self._generation.Generate, request, timeout))

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """See `Client.stream`; not awaited itself: `async for delta in client.stream(...)`."""
        request = generation_pb2.GenerateStreamRequest(request=requests.generate(prompt, **options))
        return AsyncStream(
            self._generation.GenerateStream(request, **self._defaults.arguments(timeout))
        )

    async def register_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        load: bool = False,
        timeout: float | None = None,
    ) -> Registration:
        """See `Client.register_adapter`."""
        request = adapter_pb2.RegisterAdapterRequest(
            name=name, path=path, replace=replace, load=load
        )
        reply = await self._call(self._adapters.RegisterAdapter, request, timeout)
        return replies.registration(reply)

    async def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.get_adapter`."""
        request = adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.GetAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def list_adapters(
        self, *, page_size: int = 0, timeout: float | None = None
    ) -> list[AdapterInfo]:
        """See `Client.list_adapters`."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = adapter_pb2.ListAdaptersRequest(page_size=page_size, page_token=token)
            page = await self._call(self._adapters.ListAdapters, request, timeout)
            found += map(replies.adapter, page.adapters)
            token = page.next_page_token
            if not token:
                return found

    async def load_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.load_adapter`."""
        request = adapter_pb2.LoadAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.LoadAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def unload_adapter(
        self, adapter_id: str, *, force: bool = False, timeout: float | None = None
    ) -> AdapterInfo:
        """See `Client.unload_adapter`."""
        request = adapter_pb2.UnloadAdapterRequest(adapter_id=adapter_id, force=force)
        reply = await self._call(self._adapters.UnloadAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """See `Client.delete_adapter`."""
        request = adapter_pb2.DeleteAdapterRequest(name=name)
        await self._call(self._adapters.DeleteAdapter, request, timeout)

    async def health(
        self, service: str = "", *, timeout: float = channel.HEALTH_TIMEOUT
    ) -> HealthStatus:
        """See `Client.health`."""
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = await self._health.Check(request, **self._defaults.probe(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return replies.health(reply.status)

    async def close(self) -> None:
        """Close the connection; calls that are running are cancelled."""
        if "_channel" in self.__dict__:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, timeout: float | None
    ) -> R:
        try:
            return await method(request, **self._defaults.arguments(timeout))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    # Opened at the first call, not in the constructor: a channel is bound to the running loop.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return channel.connect_aio(self._target, self._credentials)

    @cached_property
    def _generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self._channel)

    @cached_property
    def _adapters(self) -> adapter_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_pb2_grpc.AdapterServiceStub(self._channel)

    @cached_property
    def _health(self) -> Any:
        return health_pb2_grpc.HealthStub(self._channel)


class AsyncStream:
    """See `Stream`: the same members, with `async for`. Cancelling the reader cancels the call."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[
            generation_pb2.GenerateStreamRequest, generation_pb2.GenerateStreamResponse
        ],
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._transcript = replies.Transcript()
        self._cancelled = False

    @property
    def started(self) -> Started | None:
        return self._transcript.started

    @property
    def finished(self) -> Finished | None:
        return self._transcript.finished

    async def completion(self) -> Completion:
        """See `Stream.completion`."""
        async for _ in self:
            pass
        return self._transcript.completion()

    def cancel(self) -> None:
        """Stop. A reader then gets Cancelled. After the end it does nothing."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        self.cancel()

    def __del__(self) -> None:
        # Its iterator keeps a dropped grpc.aio call alive; a loop that is gone has none to cancel.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        try:
            async for message in self._messages:
                delta = self._transcript.feed(message)
                if delta is not None:
                    return delta
        except asyncio.CancelledError:
            # grpc.aio raises this for a cancelled reader and for a cancelled call alike.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                self._call.cancel()
                raise
            raise cancelled_here() from None
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        self._transcript.close()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
