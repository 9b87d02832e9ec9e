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

from loraplex_server.access.principals import caller
from loraplex_server.access.rules import labels_of_new, require_labelling, require_name
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.registry.registry import Registry
from loraplex_server.registry.terms import Registered, RegistrationTerms
from loraplex_server.registry.view import View, require_changeable
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
    changes: bool = True,
) -> Any:
    """A handler that carries out an order to the engine and describes the adapter afterwards.

    See `AdapterService._ordered`.
    """

    async def handle(service: AdapterService, request: Any, context: _Context) -> Any:
        adapter = await service._ordered(
            request.adapter_id,
            lambda ref: order(service._engine, ref),
            uses=uses,
            changes=changes,
        )
        return reply(adapter=adapter)

    return handle


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """See loraplex/v1/adapter.proto.

    Versions that the caller does not see do not exist for it, in any method. A returned adapter is
    described as it is after the call. Calls that only read the store or only move an adapter within
    the engine use these directly; all others go through the registry.
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
        work = self._registry.read(self._store.page, *terms, caller().seen)
        page = await _typed(work, "", "page_token")
        reply = pb.ListAdaptersResponse(next_page_token=page.next_page_token)
        await extend_in_slices(reply.adapters, page.records, self._describe)
        return reply

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, context: _Context
    ) -> pb.ListAdapterVersionsResponse:
        """Lists all versions of a name, the newest first."""
        require(validate.name(request.name))
        work = self._registry.read(self._store.versions, request.name, caller().seen)
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
            source = self._registry.imported(request.path, caller())
            report = await _typed(self._registry.examine(source), "", "path")
            notes = folder_notes(source.names)
        else:
            upload = request.upload_id, caller().owner
            work = self._registry.examine(partial(self._store.uploads.reading, *upload))
            report = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return describe.judgement(report, notes)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: _Context
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        """Streams the table of adapters, then its changes."""
        watched = watching.watch(self._registry.feed, self._gate, View.of(caller()))
        try:
            async with aclosing(watched) as messages:
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
        principal = caller()
        require_name(principal, request.name)
        terms = RegistrationTerms(
            request.name,
            request.replace,
            labels_of_new(principal, request.labels),
            load=request.load,
            text=VersionText.of(request.chat_template, request.eos_token_ids),
            seen=principal.seen,
            copies=principal.copies,
            allotment=await self._uploads.allotment(principal),
            signature=request.signature,
        )
        source = self._registry.imported(request.path, principal)
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
        require_labelling(caller(), request.set, request.remove)
        change = (request.adapter_id, dict(request.set), list(request.remove))
        work = self._registry.label(*change, caller())
        record = await _typed(work, request.adapter_id, "set")
        return pb.LabelAdapterResponse(adapter=self._describe(record))

    async def SetAlias(self, request: pb.SetAliasRequest, context: _Context) -> pb.SetAliasResponse:
        """Points an alias to a version."""
        require(validate.alias(request))
        require_name(caller(), request.alias)
        expected = request.expected if request.HasField("expected") else None
        change = (request.alias, request.adapter_id, expected)
        work = self._registry.set_alias(*change, caller().seen)
        record = await _typed(work, request.adapter_id, "adapter_id")
        return pb.SetAliasResponse(adapter=self._describe(record))

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: _Context
    ) -> pb.DeleteAliasResponse:
        """Deletes an alias."""
        require(validate.name(request.alias, "alias"))
        require_name(caller(), request.alias)
        work = self._registry.delete_alias(request.alias, caller().seen)
        await _typed(work, request.alias, "alias")
        return pb.DeleteAliasResponse()

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: _Context
    ) -> pb.DeleteAdapterResponse:
        """Deletes a name."""
        require(validate.name(request.name))
        require_name(caller(), request.name)
        work = self._registry.delete(request.name, caller().seen)
        await _typed(work, request.name, "name")
        return pb.DeleteAdapterResponse()

    async def RestoreAdapter(
        self, request: pb.RestoreAdapterRequest, context: _Context
    ) -> pb.RestoreAdapterResponse:
        """Restores a deleted name."""
        require(validate.name(request.name))
        require_name(caller(), request.name)
        principal = caller()
        allotment = await self._uploads.allotment(principal)
        work = self._registry.restore(request.name, principal.seen, allotment)
        record = await _typed(work, request.name, "name")
        return pb.RestoreAdapterResponse(adapter=self._describe(record))

    # uploads

    async def StartUpload(
        self, request: pb.StartUploadRequest, context: _Context
    ) -> pb.StartUploadResponse:
        """Opens an upload and returns its id."""
        await _typed(self._uploads.require_begin(caller()), "", "", _UPLOAD)
        by = peer_address(context.peer()), caller().name
        work = self._lanes.uploads.run(self._store.uploads.begin, *by)
        upload_id = await _typed(work, "", "", _UPLOAD)
        return pb.StartUploadResponse(upload_id=upload_id)

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[pb.UploadAdapterRequest],
        context: _Context,
    ) -> pb.UploadAdapterResponse:
        """Receives an adapter's files and registers it."""
        peer = peer_address(context.peer())
        work = self._uploads.receive(request_iterator, peer, caller())
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
        upload = request.upload_id, caller().owner
        work = self._lanes.uploads.run(self._store.uploads.state, *upload)
        sizes = await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return pb.GetUploadResponse(
            config_bytes=sizes.config_bytes, weights_bytes=sizes.weights_bytes
        )

    async def ListUploads(
        self, request: pb.ListUploadsRequest, context: _Context
    ) -> pb.ListUploadsResponse:
        """Lists the open uploads."""
        work = self._lanes.uploads.run(self._store.uploads.all, caller().owner)
        found = await _typed(work, "", "", _UPLOAD)
        return pb.ListUploadsResponse(uploads=map(describe.upload, found))

    async def AbortUpload(
        self, request: pb.AbortUploadRequest, context: _Context
    ) -> pb.AbortUploadResponse:
        """Deletes an upload."""
        require(validate.upload_id(request.upload_id))
        upload = request.upload_id, caller().owner
        work = self._lanes.uploads.run(self._store.uploads.abort, *upload)
        await _typed(work, request.upload_id, "upload_id", _UPLOAD)
        return pb.AbortUploadResponse()

    # residency

    LoadAdapter = _order(
        pb.LoadAdapterResponse, lambda engine, ref: engine.load(ref), changes=False
    )
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
        how = request.force, drain, caller().sees_all
        adapter = await self._ordered(
            request.adapter_id, lambda ref: self._registry.unload(ref, *how), uses=False
        )
        return pb.UnloadAdapterResponse(adapter=adapter)

    async def _ordered(
        self,
        adapter_id: str,
        order: Callable[[AdapterRef], Awaitable[None]],
        *,
        uses: bool,
        changes: bool = True,
    ) -> pb.Adapter:
        """Carries out an order to the engine and describes the adapter afterwards.

        An order that `uses` the adapter is refused for one that may not be served, and one that
        `changes` it for all who use it, for one that others have under names that are not seen.
        """
        require(validate.adapter_id(adapter_id))
        resolving = self._registry.servable if uses else self._registry.resolve
        adapter = await _typed(resolving(adapter_id, caller()), adapter_id, "adapter_id")
        if changes:
            changing = require_changeable(self._registry, adapter, caller())
            await _typed(changing, adapter_id, "adapter_id")
        await _typed(order(adapter.ref), adapter_id, "adapter_id")
        return self._describe(adapter.record)

    async def _resolve(self, adapter_id: str) -> Registered:
        require(validate.adapter_id(adapter_id))
        work = self._registry.resolve(adapter_id, caller())
        return await _typed(work, adapter_id, "adapter_id")

    def _describe(self, record: Record) -> pb.Adapter:
        row = View.of(caller()).row(record, self._engine.adapters)
        return describe.adapter(row, self._registry.obstacle(record))


async def _typed(work: Awaitable[T], about: str, field: str, kind: str = _ADAPTER) -> T:
    """Awaits `work` and turns refusals of the store and the engine into the client's."""
    try:
        return await work
    except Refusal as refusal:
        raise for_client(refusal, Subject(kind, about), field) from refusal
