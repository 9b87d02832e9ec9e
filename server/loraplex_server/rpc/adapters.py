"""AdapterService: the registry over gRPC."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.store import Record

from loraplex_server.engine.client import EngineFailure
from loraplex_server.engine.messages import AdapterStatus
from loraplex_server.registry import Registered, Registry
from loraplex_server.rpc import validate
from loraplex_server.rpc.errors import (
    ErrorSubject,
    Violation,
    from_adapter_error,
    from_failure,
    invalid,
)

DEFAULT_PAGE: Final = 100

_STATES: Final = {
    "loading": adapter_pb2.ADAPTER_STATE_LOADING,
    "resident": adapter_pb2.ADAPTER_STATE_RESIDENT,
    "draining": adapter_pb2.ADAPTER_STATE_DRAINING,
}

_Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """See loraplex/v1/adapter.proto."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def RegisterAdapter(
        self, request: adapter_pb2.RegisterAdapterRequest, context: _Context
    ) -> adapter_pb2.RegisterAdapterResponse:
        """Checks, copies and names a directory below the import root."""
        _require(validate.register(request))
        adapter, created = await _typed(
            self._registry.register(request.name, request.path, request.replace),
            request.name,
            "path",
        )
        if request.load:
            await _typed(self._registry.load(adapter), request.name, "name")
        return adapter_pb2.RegisterAdapterResponse(
            adapter=self._describe(adapter.record), created=created
        )

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
        page = await _typed(
            self._registry.list(request.page_size or DEFAULT_PAGE, request.page_token),
            "",
            "page_token",
        )
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self._describe(record) for record in page.records],
            next_page_token=page.next_page_token,
        )

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
        adapter = await self._resolve(request.adapter_id)
        await _typed(
            self._registry.unload(adapter, request.force), request.adapter_id, "adapter_id"
        )
        return adapter_pb2.UnloadAdapterResponse(adapter=self._describe(adapter.record))

    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: _Context
    ) -> adapter_pb2.DeleteAdapterResponse:
        """Forgets a name."""
        _require(validate.name(request.name))
        await _typed(self._registry.delete(request.name), request.name, "name")
        return adapter_pb2.DeleteAdapterResponse()

    async def _resolve(self, adapter_id: str) -> Registered:
        _require(validate.adapter_id(adapter_id))
        return await _typed(self._registry.resolve(adapter_id), adapter_id, "adapter_id")

    def _describe(self, record: Record) -> adapter_pb2.Adapter:
        status: AdapterStatus | None = self._registry.residency(record.digest)
        created = Timestamp()
        created.FromDatetime(record.created_at)
        return adapter_pb2.Adapter(
            name=record.name,
            version=record.version,
            digest=record.digest,
            peft_type=record.peft_type,
            rank=record.rank,
            target_modules=record.target_modules,
            size_bytes=record.size_bytes,
            state=_STATES[status.state] if status else adapter_pb2.ADAPTER_STATE_STORED,
            device_bytes=status.bytes if status and status.state != "loading" else 0,
            active_requests=status.refs if status else 0,
            create_time=created,
            base_model=record.base_model,
        )


def _require(violations: list[Violation]) -> None:
    if violations:
        raise invalid(violations)


async def _typed(work: Awaitable[T], adapter: str, field: str) -> T:
    """Awaits `work`; the errors of store and engine become the table's."""
    subject = ErrorSubject("loraplex.v1.Adapter", adapter)
    try:
        return await work
    except AdapterError as error:
        raise from_adapter_error(error, subject, field) from error
    except EngineFailure as error:
        raise from_failure(error.failure, subject) from error
