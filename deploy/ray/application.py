"""Loraplex as an application of Ray Serve: requests are sent to a server that has their adapter.

    serve run deploy/ray/serve.yaml

Every replica of `Servers` runs a Loraplex server as a process of its own. `Ingress` has the methods
of the RPCs, and gives each request to a replica that holds its adapter, if Ray knows one with room.
Uploads and watches are not offered: a watch would see one replica only. The replicas share one
adapter store, so they need `LORAPLEX_STORE_URL`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from ray import serve

PLACES = int(os.environ.get("LORAPLEX_RAY_ADAPTERS", "32"))
"""Adapters that Ray remembers for a replica: as many as fit on its device. If it is larger, Ray
takes each replica for one that has every adapter."""

STOP_SECONDS = 60.0
"""Longest end of a server: its drain and what a shutdown may take beyond it."""


@dataclass(frozen=True)
class Failure:
    """The status of a failed call, in a form that can be sent between Ray's processes."""

    code: int
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Failure:
        """The status of an error."""
        trailers = tuple((str(key), value) for key, value in error.trailing_metadata() or ())
        return cls(error.code().value[0], error.details() or "", trailers)

    def set_on(self, context: Any) -> None:
        """Gives a call this status, with its details."""
        code = next(each for each in grpc.StatusCode if each.value[0] == self.code)
        context.set_code(code)
        context.set_details(self.details)
        context.set_trailing_metadata(list(self.trailers))


class LocalServer:
    """A Loraplex server as a child process."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Returns once it serves. Raises RuntimeError if it does not start."""
        self._process = subprocess.Popen(
            command,
            env={
                **os.environ,
                **environment,
                "LORAPLEX_PORT": "0",
                "LORAPLEX_ADMIN_PORT": "0",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        if words[:2] != ["ready:", "grpc"]:
            raise RuntimeError(f"the server ended with exit code {self._process.wait()}")
        self.address = words[2]

    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Lets running calls finish, then ends the process."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=256,
    health_check_period_s=10,
    graceful_shutdown_timeout_s=STOP_SECONDS,
)
class Servers:
    """One server, and the adapters that Ray has sent to it."""

    def __init__(
        self, command: list[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """`command` starts the server; without one, `loraplex-server serve` of this environment."""
        own = [os.path.join(os.path.dirname(sys.executable), "loraplex-server"), "serve"]
        self._server = LocalServer(command or own, environment or {})
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}

    def _stub(self, service: str) -> Any:
        """The stub of a service, on the running event loop."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._server.address)
            self._stubs = {
                "generation": generation_pb2_grpc.GenerationServiceStub(self._channel),
                "adapters": adapter_pb2_grpc.AdapterServiceStub(self._channel),
                "health": health_pb2_grpc.HealthStub(self._channel),
            }
        return self._stubs[service]

    @serve.multiplexed(max_num_models_per_replica=PLACES)
    async def adapter(self, adapter_id: str) -> str:
        """Notes that this replica has an adapter. The server itself loads it with the request."""
        return adapter_id

    async def _arrived(self) -> None:
        adapter_id = serve.get_multiplexed_model_id()
        if adapter_id:
            await self.adapter(adapter_id)

    async def call(self, service: str, method: str, request: Any) -> Any:
        """The reply to a unary call, or a Failure."""
        await self._arrived()
        try:
            return await getattr(self._stub(service), method)(request)
        except grpc.aio.AioRpcError as error:
            return Failure.of(error)

    async def stream(self, request: Any) -> AsyncIterator[Any]:
        """The messages of a generation; a Failure at the end if it failed."""
        await self._arrived()
        call = self._stub("generation").GenerateStream(request)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            yield Failure.of(error)
        finally:
            call.cancel()

    async def check_health(self) -> None:
        """Raises RuntimeError if the server has ended or does not serve: Ray replaces it then."""
        if not self._server.is_running():
            raise RuntimeError("the server has ended")
        reply = await self._stub("health").Check(health_pb2.HealthCheckRequest(), timeout=5)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the server does not serve")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor failed
            self._server.stop()


def adapter_of(request: generation_pb2.GenerateRequest) -> str:
    """The adapter by which a request is routed: of a mix the first; "" for the base."""
    if request.adapter_id:
        return request.adapter_id
    return request.mix[0].adapter_id if request.mix else ""


class Ingress:
    """The methods of the RPCs, which Ray's gRPC proxy calls by their names."""

    def __init__(self, servers: Any) -> None:
        self._servers = servers

    async def Generate(self, request: Any, grpc_context: Any) -> Any:
        """Generates on a replica that has the adapter."""
        chosen = self._servers.options(multiplexed_model_id=adapter_of(request))
        reply = await chosen.call.remote("generation", "Generate", request)
        return answered(reply, grpc_context, generation_pb2.GenerateResponse)

    async def Embed(self, request: Any, grpc_context: Any) -> Any:
        """Embeds texts on a replica that has the adapter."""
        chosen = self._servers.options(multiplexed_model_id=request.adapter_id)
        reply = await chosen.call.remote("generation", "Embed", request)
        return answered(reply, grpc_context, generation_pb2.EmbedResponse)

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Streams from a replica that has the adapter."""
        chosen = self._servers.options(
            stream=True, multiplexed_model_id=adapter_of(request.request)
        )
        async for message in chosen.stream.remote(request):
            if isinstance(message, Failure):
                message.set_on(grpc_context)
            else:
                yield message


FORWARDED = {
    "RegisterAdapter": adapter_pb2.RegisterAdapterResponse,
    "GetAdapter": adapter_pb2.GetAdapterResponse,
    "ListAdapters": adapter_pb2.ListAdaptersResponse,
    "ListAdapterVersions": adapter_pb2.ListAdapterVersionsResponse,
    "ValidateAdapter": adapter_pb2.ValidateAdapterResponse,
    "LabelAdapter": adapter_pb2.LabelAdapterResponse,
    "SetAlias": adapter_pb2.SetAliasResponse,
    "DeleteAlias": adapter_pb2.DeleteAliasResponse,
    "DeleteAdapter": adapter_pb2.DeleteAdapterResponse,
    "RestoreAdapter": adapter_pb2.RestoreAdapterResponse,
}
"""Calls about the store, which any replica can answer, each with its reply."""


def answered(reply: Any, context: Any, empty: type) -> Any:
    """A reply; for a Failure an empty one, whose call has the failure's status."""
    if not isinstance(reply, Failure):
        return reply
    reply.set_on(context)
    return empty()


def _forwarded(method: str, empty: type) -> Any:
    async def forward(self: Ingress, request: Any, grpc_context: Any) -> Any:
        reply = await self._servers.call.remote("adapters", method, request)
        return answered(reply, grpc_context, empty)

    forward.__name__ = method
    return forward


for _method, _empty in FORWARDED.items():
    setattr(Ingress, _method, _forwarded(_method, _empty))


def build(arguments: Mapping[str, Any]) -> Any:
    """The application: `replicas`, and `command` and `environment` of their servers."""
    servers = Servers.options(num_replicas=int(arguments.get("replicas", 2))).bind(
        arguments.get("command"), arguments.get("environment")
    )
    # It only passes messages on, so it asks for no core of its own.
    ingress = serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})
    return ingress(Ingress).bind(servers)
