"""AdapterService: the registry over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import grpc
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Problem, Refusal, Subject

from loraplex_server.registry import Registered, Registry, Terms
from loraplex_server.rpc import describe, watching
from loraplex_server.rpc import validate_adapters as validate
from loraplex_server.rpc.errors import for_client, invalid
from loraplex_server.rpc.interceptor import Gate
from loraplex_server.rpc.uploads import Uploads

DEFAULT_PAGE: Final = 100

_ADAPTER: Final = "loraplex.v1.Adapter"
_UPLOAD: Final = "loraplex.v1.Upload"

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """See loraplex/v1/adapter.proto."""

    def __init__(self, registry: Registry, gate: Gate) -> None:
        self._registry = registry
        self._gate = gate
        self._uploads = Uploads(registry, gate)

    # what there is

    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: _Context
    ) -> adapter_pb2.GetAdapterResponse:
        """Describes one adapter."""
        adapter = await self._resolve(request.adapter_id)
        return adapter_pb2.GetAdapterResponse(adapter=self._describe(adapter.record))

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: _Context
    ) -> adapter_pb2.ListAdaptersResponse:
        """A page of adapters by name."""
        _require(validate.page(request))
        size = request.page_size or DEFAULT_PAGE
        page = await _typed(
            self._registry.list(size, request.page_token, dict(request.labels)), "", "page_token"
        )
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self._describe(record) for record in page.records],
            next_page_token=page.next_page_token,
        )

    async def ListAdapterVersions(
        self, request: adapter_pb2.ListAdapterVersionsRequest, context: _Context
    ) -> adapter_pb2.ListAdapterVersionsResponse:
        """All versions of a name."""
        _require(validate.name(request.name))
        found = await _typed(self._registry.versions(request.name), request.name, "name")
        return adapter_pb2.ListAdapterVersionsResponse(
            adapters=[self._describe(record) for record in found]
        )

    async def ValidateAdapter(
        self, request: adapter_pb2.ValidateAdapterRequest, context: _Context
    ) -> adapter_pb2.ValidateAdapterResponse:
        """Tells everything that is wrong with an adapter's files."""
        _require(validate.validation(request))
        if request.WhichOneof("source") == "path":
            report = await _typed(self._registry.examine(request.path), "", "path")
        else:
            work = self._registry.examine_upload(request.upload_id)
            report = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return describe.judgement(report)

    async def WatchAdapters(
        self, request: adapter_pb2.WatchAdaptersRequest, context: _Context
    ) -> AsyncGenerator[adapter_pb2.WatchAdaptersResponse, None]:
        """The table of adapters, then its changes."""
        try:
            async with aclosing(watching.watch(self._registry.feed, self._gate)) as messages:
                async for message in messages:
                    yield message
        except Refusal as error:
            raise for_client(error, Subject(_ADAPTER)) from error

    # names

    async def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: _Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        """Checks, copies and names a directory below the import root."""
        _require(validate.register(request))
        terms = Terms(request.name, request.replace, dict(request.labels), load=request.load)
        adapter, created = await _typed(
            self._registry.register(request.path, terms), request.name, "path"
        )
        return adapter_pb2.RegisterAdapterResponse(
            adapter=self._describe(adapter.record), created=created
        )

    async def LabelAdapter(
        self, request: adapter_pb2.LabelAdapterRequest, context: _Context
    ) -> adapter_pb2.LabelAdapterResponse:
        """Sets and removes labels."""
        _require(validate.label(request))
        work = self._registry.label(request.adapter_id, dict(request.set), list(request.remove))
        record = await _typed(work, request.adapter_id, "set")
        return adapter_pb2.LabelAdapterResponse(adapter=self._describe(record))

    async def SetAlias(
        self, request: adapter_pb2.SetAliasRequest, context: _Context
    ) -> adapter_pb2.SetAliasResponse:
        """Points an alias."""
        _require(validate.alias(request))
        expected = request.expected if request.HasField("expected") else None
        work = self._registry.set_alias(request.alias, request.adapter_id, expected)
        record = await _typed(work, request.adapter_id, "adapter_id")
        return adapter_pb2.SetAliasResponse(adapter=self._describe(record))

    async def DeleteAlias(
        self, request: adapter_pb2.DeleteAliasRequest, context: _Context
    ) -> adapter_pb2.DeleteAliasResponse:
        """Removes an alias."""
        _require(validate.name(request.alias, "alias"))
        await _typed(self._registry.delete_alias(request.alias), request.alias, "alias")
        return adapter_pb2.DeleteAliasResponse()

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: _Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        """Forgets a name."""
        _require(validate.name(request.name))
        await _typed(self._registry.delete(request.name), request.name, "name")
        return adapter_pb2.DeleteAdapterResponse()

    async def RestoreAdapter(
        self, request: adapter_pb2.RestoreAdapterRequest, context: _Context
    ) -> adapter_pb2.RestoreAdapterResponse:
        """Brings a deleted name back."""
        _require(validate.name(request.name))
        record = await _typed(self._registry.restore(request.name), request.name, "name")
        return adapter_pb2.RestoreAdapterResponse(adapter=self._describe(record))

    # uploads

    async def StartUpload(
        self, request: adapter_pb2.StartUploadRequest, context: _Context
    ) -> adapter_pb2.StartUploadResponse:
        """Gives the id of a new upload."""
        upload_id = await _typed(self._registry.start_upload(), "", "", _UPLOAD)
        return adapter_pb2.StartUploadResponse(upload_id=upload_id)

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapter_pb2.UploadAdapterRequest],
        context: _Context,
    ) -> adapter_pb2.UploadAdapterResponse:
        """Takes an adapter's files and registers it."""
        done = await _typed(self._uploads.receive(request_iterator), "", "name", _UPLOAD)
        if done.adapter is None:
            return adapter_pb2.UploadAdapterResponse()
        return adapter_pb2.UploadAdapterResponse(
            adapter=self._describe(done.adapter.record), created=done.created
        )

    async def GetUpload(
        self, request: adapter_pb2.GetUploadRequest, context: _Context
    ) -> adapter_pb2.GetUploadResponse:
        """Says how much of an upload is there."""
        _require(validate.upload_id(request.upload_id))
        work = self._registry.uploaded(request.upload_id)
        sizes = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return adapter_pb2.GetUploadResponse(
            config_bytes=sizes.config_bytes, weights_bytes=sizes.weights_bytes
        )

    async def AbortUpload(
        self, request: adapter_pb2.AbortUploadRequest, context: _Context
    ) -> adapter_pb2.AbortUploadResponse:
        """Drops an upload."""
        _require(validate.upload_id(request.upload_id))
        work = self._registry.abort_upload(request.upload_id)
        await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return adapter_pb2.AbortUploadResponse()

    # where it is

    async def LoadAdapter(
        self, request: adapter_pb2.LoadAdapterRequest, context: _Context
    ) -> adapter_pb2.LoadAdapterResponse:
        """Makes an adapter resident."""
        adapter = await self._resolve(request.adapter_id)
        await _typed(self._registry.load(adapter), request.adapter_id, "adapter_id")
        return adapter_pb2.LoadAdapterResponse(adapter=self._describe(adapter.record))

    async def UnloadAdapter(
        self, request: adapter_pb2.UnloadAdapterRequest, context: _Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        """Takes an adapter off the device."""
        _require(validate.unload(request))
        adapter = await self._resolve(request.adapter_id)
        drain = None
        if request.HasField("drain"):
            drain = request.drain.seconds + request.drain.nanos / 1e9
        work = self._registry.unload(adapter, request.force, drain)
        await _typed(work, request.adapter_id, "adapter_id")
        return adapter_pb2.UnloadAdapterResponse(adapter=self._describe(adapter.record))

    async def PinAdapter(
        self, request: adapter_pb2.PinAdapterRequest, context: _Context
    ) -> adapter_pb2.PinAdapterResponse:
        """Makes an adapter resident for good."""
        adapter = await self._resolve(request.adapter_id)
        await _typed(self._registry.pin(adapter, True), request.adapter_id, "adapter_id")
        return adapter_pb2.PinAdapterResponse(adapter=self._describe(adapter.record))

    async def UnpinAdapter(
        self, request: adapter_pb2.UnpinAdapterRequest, context: _Context
    ) -> adapter_pb2.UnpinAdapterResponse:
        """Lets an adapter be evicted."""
        adapter = await self._resolve(request.adapter_id)
        await _typed(self._registry.pin(adapter, False), request.adapter_id, "adapter_id")
        return adapter_pb2.UnpinAdapterResponse(adapter=self._describe(adapter.record))

    async def MergeAdapter(
        self, request: adapter_pb2.MergeAdapterRequest, context: _Context
    ) -> adapter_pb2.MergeAdapterResponse:
        """Gives an adapter's requests dense copies."""
        adapter = await self._resolve(request.adapter_id)
        await _typed(self._registry.merge(adapter), request.adapter_id, "adapter_id")
        return adapter_pb2.MergeAdapterResponse(adapter=self._describe(adapter.record))

    async def UnmergeAdapter(
        self, request: adapter_pb2.UnmergeAdapterRequest, context: _Context
    ) -> adapter_pb2.UnmergeAdapterResponse:
        """Drops them."""
        adapter = await self._resolve(request.adapter_id)
        await _typed(self._registry.unmerge(adapter), request.adapter_id, "adapter_id")
        return adapter_pb2.UnmergeAdapterResponse(adapter=self._describe(adapter.record))

    async def _resolve(self, adapter_id: str) -> Registered:
        _require(validate.adapter_id(adapter_id))
        return await _typed(self._registry.resolve(adapter_id), adapter_id, "adapter_id")

    def _describe(self, record: Record) -> adapter_pb2.Adapter:
        return describe.adapter(record, self._registry.residency(record.digest))


def _require(violations: list[Problem]) -> None:
    if violations:
        raise invalid(violations)


async def _typed(work: Awaitable[T], about: str, field: str, kind: str = _ADAPTER) -> T:
    """Awaits `work`; refusals of the store and the engine become the client's."""
    try:
        return await work
    except Refusal as refusal:
        raise for_client(refusal, Subject(kind, about), field) from refusal
