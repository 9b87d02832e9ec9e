"""AdapterService: the registry over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc
from loraplex_adapters.format.foreign.notes import folder_notes
from loraplex_adapters.store import Record, VersionText
from loraplex_model.base.refusal import Refusal, Subject

from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.registry.feed import AdapterRow
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered, RegistrationTerms
from loraplex_server.rpc.calls.errors import for_client, require
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.peers import peer_address
from loraplex_server.rpc.messages import describe
from loraplex_server.rpc.messages import validate_adapters as validate
from loraplex_server.rpc.messages.slices import extend_in_slices
from loraplex_server.rpc.services import watching
from loraplex_server.rpc.services.uploads import UploadReceiver

DEFAULT_PAGE: Final = 100

_ADAPTER: Final = "loraplex.v1.Adapter"
_UPLOAD: Final = "loraplex.v1.Upload"

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


def _order(
    reply: Callable[..., Any],
    order: Callable[[Engine, AdapterRef], Awaitable[None]],
    *,
    uses: bool = True,
) -> Any:
    """A handler that carries out an order to the engine and describes the adapter afterwards.

    An order that `uses` the adapter is refused for one that may not be served.
    """

    async def handle(service: AdapterService, request: Any, context: _Context) -> Any:
        adapter = await service._ordered(
            request.adapter_id, lambda ref: order(service._engine, ref), uses=uses
        )
        return reply(adapter=adapter)

    return handle


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """See loraplex/v1/adapter.proto.

    A returned adapter is described as it is after the call. Calls that only read the store or only
    move an adapter within the engine use these directly; all others go through the registry.
    """

    def __init__(self, registry: Registry, gate: CallGate) -> None:
        self._registry = registry
        self._store = registry.store
        self._engine = registry.engine
        self._lanes = registry.lanes
        self._gate = gate
        self._uploads = UploadReceiver(registry, gate)

    # look-up

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: _Context
    ) -> pb.GetAdapterResponse:
        """Describes one adapter."""
        adapter = await self._resolve(request.adapter_id)
        return pb.GetAdapterResponse(adapter=self._describe(adapter.record))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: _Context
    ) -> pb.ListAdaptersResponse:
        """Lists a page of adapters in the order of names."""
        require(validate.page(request))
        size = request.page_size or DEFAULT_PAGE
        terms = (size, request.page_token, dict(request.labels))
        work = self._registry.read(self._store.page, *terms)
        page = await _typed(work, "", "page_token")
        reply = pb.ListAdaptersResponse(next_page_token=page.next_page_token)
        await extend_in_slices(reply.adapters, page.records, self._describe)
        return reply

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: _Context
    ) -> pb.ListAdapterVersionsResponse:
        """Lists all versions of a name, the newest first."""
        require(validate.name(request.name))
        work = self._registry.read(self._store.versions, request.name)
        found = await _typed(work, request.name, "name")
        reply = pb.ListAdapterVersionsResponse()
        await extend_in_slices(reply.adapters, found, self._describe)
        return reply

    async def ValidateAdapter(
        self, request: pb.ValidateAdapterRequest, context: _Context
    ) -> pb.ValidateAdapterResponse:
        """Reports all faults of an adapter's files, or what the adapter is."""
        require(validate.validation(request))
        notes = folder_notes(request.other_files)
        if request.WhichOneof("source") == "path":
            source = self._registry.imported(request.path)
            report = await _typed(self._registry.examine(source), "", "path")
            notes = folder_notes(source.names)
        else:
            work = self._registry.examine(partial(self._store.uploads.reading, request.upload_id))
            report = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return describe.judgement(report, notes)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: _Context
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        """Streams the table of adapters, then its changes."""
        try:
            async with aclosing(watching.watch(self._registry.feed, self._gate)) as messages:
                async for message in messages:
                    yield message
        except Refusal as error:
            raise for_client(error, Subject(_ADAPTER)) from error

    # names

    async def RegisterAdapter(
        self, request: pb.RegisterAdapterRequest, context: _Context
    ) -> pb.RegisterAdapterResponse:
        """Checks, copies and registers a directory below the import root."""
        require(validate.register(request))
        terms = RegistrationTerms(
            request.name,
            request.replace,
            dict(request.labels),
            load=request.load,
            text=VersionText.of(request.chat_template, request.eos_token_ids),
            signature=request.signature,
        )
        source = self._registry.imported(request.path)
        work = self._registry.register(source, terms)
        adapter, created = await _typed(work, request.name, "path")
        notes = folder_notes(source.names, has_template=bool(request.chat_template))
        return pb.RegisterAdapterResponse(
            adapter=self._describe(adapter.record),
            created=created,
            notes=[*notes, *adapter.record.notes],
        )

    async def LabelAdapter(
        self, request: pb.LabelAdapterRequest, context: _Context
    ) -> pb.LabelAdapterResponse:
        """Sets and removes labels of a version."""
        require(validate.label(request))
        change = (request.adapter_id, dict(request.set), list(request.remove))
        work = self._registry.change(self._store.label, *change)
        record = await _typed(work, request.adapter_id, "set")
        return pb.LabelAdapterResponse(adapter=self._describe(record))

    async def SetAlias(self, request: pb.SetAliasRequest, context: _Context) -> pb.SetAliasResponse:
        """Points an alias to a version."""
        require(validate.alias(request))
        expected = request.expected if request.HasField("expected") else None
        work = self._registry.set_alias(request.alias, request.adapter_id, expected)
        record = await _typed(work, request.adapter_id, "adapter_id")
        return pb.SetAliasResponse(adapter=self._describe(record))

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: _Context
    ) -> pb.DeleteAliasResponse:
        """Deletes an alias."""
        require(validate.name(request.alias, "alias"))
        await _typed(self._registry.delete_alias(request.alias), request.alias, "alias")
        return pb.DeleteAliasResponse()

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: _Context
    ) -> pb.DeleteAdapterResponse:
        """Deletes a name."""
        require(validate.name(request.name))
        await _typed(self._registry.delete(request.name), request.name, "name")
        return pb.DeleteAdapterResponse()

    async def RestoreAdapter(
        self, request: pb.RestoreAdapterRequest, context: _Context
    ) -> pb.RestoreAdapterResponse:
        """Restores a deleted name."""
        require(validate.name(request.name))
        record = await _typed(self._registry.restore(request.name), request.name, "name")
        return pb.RestoreAdapterResponse(adapter=self._describe(record))

    # uploads

    async def StartUpload(
        self, request: pb.StartUploadRequest, context: _Context
    ) -> pb.StartUploadResponse:
        """Opens an upload and returns its id."""
        work = self._lanes.uploads.run(self._store.uploads.begin, peer_address(context.peer()))
        upload_id = await _typed(work, "", "", _UPLOAD)
        return pb.StartUploadResponse(upload_id=upload_id)

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[pb.UploadAdapterRequest],
        context: _Context,
    ) -> pb.UploadAdapterResponse:
        """Receives an adapter's files and registers it."""
        work = self._uploads.receive(request_iterator, peer_address(context.peer()))
        done = await _typed(work, "", "name", _UPLOAD)
        if done is None:
            return pb.UploadAdapterResponse()
        return pb.UploadAdapterResponse(
            adapter=self._describe(done.adapter.record), created=done.created, notes=done.notes
        )

    async def GetUpload(
        self, request: pb.GetUploadRequest, context: _Context
    ) -> pb.GetUploadResponse:
        """Reports the received bytes of an upload."""
        require(validate.upload_id(request.upload_id))
        work = self._lanes.uploads.run(self._store.uploads.state, request.upload_id)
        sizes = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return pb.GetUploadResponse(
            config_bytes=sizes.config_bytes, weights_bytes=sizes.weights_bytes
        )

    async def ListUploads(
        self, request: pb.ListUploadsRequest, context: _Context
    ) -> pb.ListUploadsResponse:
        """Lists the open uploads."""
        found = await _typed(self._lanes.uploads.run(self._store.uploads.all), "", "", _UPLOAD)
        return pb.ListUploadsResponse(uploads=map(describe.upload, found))

    async def AbortUpload(
        self, request: pb.AbortUploadRequest, context: _Context
    ) -> pb.AbortUploadResponse:
        """Deletes an upload."""
        require(validate.upload_id(request.upload_id))
        work = self._lanes.uploads.run(self._store.uploads.abort, request.upload_id)
        await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return pb.AbortUploadResponse()

    # residency

    LoadAdapter = _order(pb.LoadAdapterResponse, lambda engine, ref: engine.load(ref))
    PinAdapter = _order(pb.PinAdapterResponse, lambda engine, ref: engine.pin(ref, True))
    UnpinAdapter = _order(
        pb.UnpinAdapterResponse, lambda engine, ref: engine.pin(ref, False), uses=False
    )
    MergeAdapter = _order(pb.MergeAdapterResponse, lambda engine, ref: engine.merge(ref))
    UnmergeAdapter = _order(
        pb.UnmergeAdapterResponse, lambda engine, ref: engine.unmerge(ref.digest), uses=False
    )

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: _Context
    ) -> pb.UnloadAdapterResponse:
        """Removes an adapter from the device."""
        require(validate.unload(request))
        drain = None
        if request.HasField("drain"):
            drain = request.drain.seconds + request.drain.nanos / 1e9
        adapter = await self._ordered(
            request.adapter_id,
            lambda a: self._registry.unload(a.digest, request.force, drain),
            uses=False,
        )
        return pb.UnloadAdapterResponse(adapter=adapter)

    async def _ordered(
        self, adapter_id: str, order: Callable[[AdapterRef], Awaitable[None]], *, uses: bool
    ) -> pb.Adapter:
        """Carries out an order to the engine and describes the adapter afterwards."""
        require(validate.adapter_id(adapter_id))
        resolving = self._registry.servable if uses else self._registry.resolve
        adapter = await _typed(resolving(adapter_id), adapter_id, "adapter_id")
        await _typed(order(adapter.ref), adapter_id, "adapter_id")
        return self._describe(adapter.record)

    async def _resolve(self, adapter_id: str) -> Registered:
        require(validate.adapter_id(adapter_id))
        return await _typed(self._registry.resolve(adapter_id), adapter_id, "adapter_id")

    def _describe(self, record: Record) -> pb.Adapter:
        status = self._engine.adapters.get(record.digest)
        row = AdapterRow(record.digest, record, status)
        return describe.adapter(row, self._registry.obstacle(record))


async def _typed(work: Awaitable[T], about: str, field: str, kind: str = _ADAPTER) -> T:
    """Awaits `work` and turns refusals of the store and the engine into the client's."""
    try:
        return await work
    except Refusal as refusal:
        raise for_client(refusal, Subject(kind, about), field) from refusal
