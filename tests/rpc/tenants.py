"""A server in this process whose calls come from different principals."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import (
    adapter_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
    training_pb2_grpc,
)
from loraplex_adapters.store import LabelSelector
from loraplex_server.access.principals import EVERYBODY, Principal, set_caller
from loraplex_server.access.roles import ALL_ROLES
from loraplex_server.rpc.server import RpcServer
from rpc.harness import Running, running, write_adapter

CALLER = "caller"
"""Metadata with the name of the principal that calls."""

ADMIN = "admin"


def tenant(name: str, selector: str | None = None, **fields: Any) -> Principal:
    """A principal that sees the adapters of the team of its name."""
    seen = LabelSelector.parse(f"team={name}" if selector is None else selector)
    fields = {"name_prefix": f"{name}-", "imports": name, **fields}
    return Principal(name=name, roles=ALL_ROLES, adapters=seen, **fields)


ALL = Principal(name=ADMIN, roles=ALL_ROLES, adapters=LabelSelector(), imports="")


class _Called:
    """A service whose handlers run as the principal that a call names."""

    def __init__(self, service: Any, principals: Mapping[str, Principal]) -> None:
        self._service = service
        self._principals = principals

    def __getattr__(self, name: str) -> Any:
        handler = getattr(self._service, name)

        def identify(context: Any) -> None:
            given = dict(context.invocation_metadata() or ()).get(CALLER, "")
            set_caller(self._principals[str(given)])

        async def once(request: Any, context: Any) -> Any:
            identify(context)
            return await handler(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            identify(context)
            async with aclosing(handler(request, context)) as messages:
                async for message in messages:
                    yield message

        return stream if inspect.isasyncgenfunction(handler) else once


@dataclass(frozen=True)
class _Stub:
    """Calls as one principal."""

    stub: Any
    name: str

    def __getattr__(self, method: str) -> Any:
        return partial(getattr(self.stub, method), metadata=((CALLER, self.name),))


class Tenant:
    """A principal's client, with the services' stubs."""

    def __init__(self, up: Running, name: str) -> None:
        self.name = name
        self.up = up
        self.adapters = _Stub(adapter_pb2_grpc.AdapterServiceStub(up.channel), name)
        self.generation = _Stub(generation_pb2_grpc.GenerationServiceStub(up.channel), name)
        self.model = _Stub(model_pb2_grpc.ModelServiceStub(up.channel), name)
        self.training = _Stub(training_pb2_grpc.TrainingServiceStub(up.channel), name)

    async def register(self, name: str, seed: int = 0, **request: Any) -> pb.Adapter:
        """Registers an adapter made for the purpose, from the tenant's own import directory."""
        folder = "" if self.name in ("", ADMIN) else self.name
        write_adapter(self.up.folder / "import" / folder / f"{name}-{seed}", seed)
        sent = pb.RegisterAdapterRequest(name=name, path=f"{name}-{seed}", **request)
        return (await self.adapters.RegisterAdapter(sent)).adapter

    async def names(self, **request: Any) -> list[str]:
        """The names that it is listed."""
        reply = await self.adapters.ListAdapters(pb.ListAdaptersRequest(**request))
        return [adapter.name for adapter in reply.adapters]

    async def get(self, adapter_id: str) -> pb.Adapter:
        """An adapter as it is shown."""
        request = pb.GetAdapterRequest(adapter_id=adapter_id)
        return (await self.adapters.GetAdapter(request)).adapter


@dataclass
class Tenants:
    """A server and its callers."""

    up: Running
    a: Tenant
    b: Tenant
    admin: Tenant

    def of(self, name: str) -> Tenant:
        """The client of another principal."""
        return Tenant(self.up, name)


@asynccontextmanager
async def tenants(folder: Path, *principals: Principal, **settings: Any) -> AsyncIterator[Tenants]:
    """A server for the tenants a and b, an administrator, and further principals.

    A given principal replaces the one of its name.
    """
    known = {each.name: each for each in (EVERYBODY, ALL, tenant("a"), tenant("b"), *principals)}
    for each in known.values():
        (folder / "import" / (each.imports or "")).mkdir(parents=True, exist_ok=True)
    start = RpcServer.start

    async def identified(server: RpcServer, *services: Any) -> None:
        await start(server, *(_Called(service, known) for service in services))  # type: ignore[arg-type]

    with mock.patch.object(RpcServer, "start", identified):
        async with running(folder, **settings) as up:
            yield Tenants(up, Tenant(up, "a"), Tenant(up, "b"), Tenant(up, ADMIN))


@dataclass(frozen=True)
class Answer:
    """All that a refusal says to its client."""

    code: grpc.StatusCode
    message: str
    details: tuple[Any, ...]
    trailers: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The reason of its ErrorInfo."""
        (info,) = [d for d in self.details if isinstance(d, error_details_pb2.ErrorInfo)]
        return str(info.reason)


_DETAILS = {
    f"type.googleapis.com/google.rpc.{kind.DESCRIPTOR.name}": kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.ResourceInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
        error_details_pb2.QuotaFailure,
    )
}


def answer_of(error: grpc.aio.AioRpcError, *names: str) -> Answer:
    """The answer with `names` and the call's id replaced, so that answers can be compared."""
    trailers = dict(error.trailing_metadata() or ())
    request_id = str(trailers["x-request-id"])

    def plain(text: str) -> str:
        for name in (request_id, *names):
            text = text.replace(name, "?")
        return text

    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    details = []
    for packed in status.details:
        kind = _DETAILS[packed.type_url]
        # As text, because a name may be of another length.
        message = kind.FromString(packed.value)
        details.append(_replaced(message, plain))
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return Answer(error.code(), plain(status.message), tuple(details), tuple(sorted(trailers)))


def _replaced(message: Any, plain: Any) -> Any:
    """A copy of a message with every text replaced."""
    text = plain(json_format.MessageToJson(message))
    return json_format.Parse(text, type(message)())
