"""The asyncio client: the names, arguments, results and errors of `Client`, awaited."""
# ruff: noqa: ASYNC109 - `timeout` becomes the call's gRPC deadline, which the server sees too

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraplex import channel, replies, requests, uploads
from loraplex.aio_jobs import AsyncTraining
from loraplex.aio_streams import AsyncStream, AsyncWatch
from loraplex.errors import (
    LoraplexError,
    Unavailable,
    UploadNotFound,
    from_rpc_error,
)
from loraplex.requests import GenerateOptions
from loraplex.results import (
    AdapterInfo,
    Completion,
    HealthStatus,
    Registration,
    UploadProgress,
    Validation,
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
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Registration:
        """See `Client.register_adapter`."""
        request = requests.register(name, path, replace, load, labels or {})
        reply = await self._call(self._adapters.RegisterAdapter, request, timeout)
        return replies.registration(reply)

    async def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.get_adapter`."""
        request = adapter_pb2.GetAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.GetAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def list_adapters(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> list[AdapterInfo]:
        """See `Client.list_adapters`."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = requests.page(page_size, token, labels or {})
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
        self,
        adapter_id: str,
        *,
        force: bool = False,
        drain: float | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """See `Client.unload_adapter`."""
        request = requests.unload(adapter_id, force, drain)
        reply = await self._call(self._adapters.UnloadAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """See `Client.delete_adapter`."""
        request = adapter_pb2.DeleteAdapterRequest(name=name)
        await self._call(self._adapters.DeleteAdapter, request, timeout)

    async def list_versions(self, name: str, *, timeout: float | None = None) -> list[AdapterInfo]:
        """See `Client.list_versions`."""
        request = adapter_pb2.ListAdapterVersionsRequest(name=name)
        reply = await self._call(self._adapters.ListAdapterVersions, request, timeout)
        return [replies.adapter(version) for version in reply.adapters]

    async def validate_adapter(
        self, path: str = "", *, upload_id: str = "", timeout: float | None = None
    ) -> Validation:
        """See `Client.validate_adapter`."""
        request = requests.validate(path, upload_id)
        return replies.validation(
            await self._call(self._adapters.ValidateAdapter, request, timeout)
        )

    async def label_adapter(
        self,
        adapter_id: str,
        labels: Mapping[str, str] | None = None,
        *,
        remove: Sequence[str] = (),
        timeout: float | None = None,
    ) -> AdapterInfo:
        """See `Client.label_adapter`."""
        request = requests.label(adapter_id, labels or {}, remove)
        reply = await self._call(self._adapters.LabelAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def set_alias(
        self,
        alias: str,
        adapter_id: str,
        *,
        expected: str | None = None,
        timeout: float | None = None,
    ) -> AdapterInfo:
        """See `Client.set_alias`."""
        request = requests.alias(alias, adapter_id, expected)
        reply = await self._call(self._adapters.SetAlias, request, timeout)
        return replies.adapter(reply.adapter)

    async def delete_alias(self, alias: str, *, timeout: float | None = None) -> None:
        """See `Client.delete_alias`."""
        request = adapter_pb2.DeleteAliasRequest(alias=alias)
        await self._call(self._adapters.DeleteAlias, request, timeout)

    async def restore_adapter(self, name: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.restore_adapter`."""
        request = adapter_pb2.RestoreAdapterRequest(name=name)
        reply = await self._call(self._adapters.RestoreAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def pin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.pin_adapter`."""
        request = adapter_pb2.PinAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.PinAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def unpin_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.unpin_adapter`."""
        request = adapter_pb2.UnpinAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.UnpinAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def merge_adapter(self, adapter_id: str, *, timeout: float | None = None) -> AdapterInfo:
        """See `Client.merge_adapter`."""
        request = adapter_pb2.MergeAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.MergeAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def unmerge_adapter(
        self, adapter_id: str, *, timeout: float | None = None
    ) -> AdapterInfo:
        """See `Client.unmerge_adapter`."""
        request = adapter_pb2.UnmergeAdapterRequest(adapter_id=adapter_id)
        reply = await self._call(self._adapters.UnmergeAdapter, request, timeout)
        return replies.adapter(reply.adapter)

    async def upload_adapter(
        self,
        name: str,
        folder: str | os.PathLike[str],
        *,
        replace: bool = False,
        load: bool = False,
        labels: Mapping[str, str] | None = None,
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> Registration:
        """See `Client.upload_adapter`."""
        files = await asyncio.to_thread(uploads.Files.read, folder)
        order = uploads.Order(name, replace, load, labels)
        return await self._upload(files, order, upload_id, progress, timeout)

    async def stage_adapter(
        self,
        folder: str | os.PathLike[str],
        *,
        upload_id: str = "",
        progress: uploads.Progress | None = None,
        timeout: float | None = None,
    ) -> str:
        """See `Client.stage_adapter`."""
        files = await asyncio.to_thread(uploads.Files.read, folder)
        upload_id = upload_id or await self.start_upload()
        await self._upload(files, uploads.Order(), upload_id, progress, timeout)
        return upload_id

    async def start_upload(self, *, timeout: float | None = None) -> str:
        """See `Client.start_upload`."""
        request = adapter_pb2.StartUploadRequest()
        return (await self._call(self._adapters.StartUpload, request, timeout)).upload_id

    async def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadProgress:
        """See `Client.get_upload`."""
        request = adapter_pb2.GetUploadRequest(upload_id=upload_id)
        return replies.upload(await self._call(self._adapters.GetUpload, request, timeout))

    async def abort_upload(self, upload_id: str, *, timeout: float | None = None) -> None:
        """See `Client.abort_upload`."""
        request = adapter_pb2.AbortUploadRequest(upload_id=upload_id)
        await self._call(self._adapters.AbortUpload, request, timeout)

    def watch_adapters(self, *, timeout: float | None = None) -> AsyncWatch:
        """See `Client.watch_adapters`."""
        request = adapter_pb2.WatchAdaptersRequest()
        return AsyncWatch(
            self._adapters.WatchAdapters(request, **self._defaults.unbounded(timeout))
        )

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

    async def _upload(
        self,
        files: uploads.Files,
        order: uploads.Order,
        upload_id: str,
        progress: uploads.Progress | None,
        timeout: float | None,
    ) -> Registration:
        """Sends until all is there; drops what it began when going on is pointless."""
        begun = not upload_id
        upload_id = upload_id or await self.start_upload()
        attempts = uploads.Attempts()
        while True:
            there = None
            try:
                there = await self.get_upload(upload_id)
                messages = uploads.stream(files, order, upload_id, there, progress)
                return await self._send(messages, timeout)
            except LoraplexError as error:
                if isinstance(error, UploadNotFound) and attempts.made and order.name:
                    # The reply was lost, not the upload: it is registered.
                    found = await self.get_adapter(order.name)
                    if found.digest == files.digest:
                        return Registration(found, created=True)
                pause = attempts.pause(error, there)
                if pause is None:
                    if begun and not isinstance(error, Unavailable):
                        with contextlib.suppress(LoraplexError):
                            await self.abort_upload(upload_id)
                    raise
            await asyncio.sleep(pause)

    async def _send(
        self, messages: Iterator[adapter_pb2.UploadAdapterRequest], timeout: float | None
    ) -> Registration:
        try:
            reply = await self._adapters.UploadAdapter(
                _in_threads(messages), **self._defaults.unbounded(timeout)
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return replies.registration(reply)

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
    def training(self) -> AsyncTraining:
        """See `Client.training`."""
        return AsyncTraining(self._channel, self._defaults)

    @cached_property
    def _health(self) -> Any:
        return health_pb2_grpc.HealthStub(self._channel)


async def _in_threads(
    messages: Iterator[adapter_pb2.UploadAdapterRequest],
) -> AsyncIterator[adapter_pb2.UploadAdapterRequest]:
    """The same messages; each is made, which reads a file, off the event loop."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
