"""The gRPC server: options, services, health, start and stop."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from loraplex.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

from loraplex_server.rpc.calls.accepting import make_server
from loraplex_server.rpc.calls.bounds import MAX_MESSAGE_BYTES
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.calls.interceptor import Interceptor
from loraplex_server.rpc.services.adapters import AdapterService
from loraplex_server.rpc.services.generation import GenerationService
from loraplex_server.rpc.services.health import HealthService
from loraplex_server.rpc.services.live.engine import EngineService
from loraplex_server.rpc.services.model import ModelService
from loraplex_server.rpc.services.reflection import ReflectionService
from loraplex_server.rpc.services.training import TrainingService
from loraplex_server.rpc.transport import ServerTls

QUIET_SECONDS: Final = 0.2
"""Seconds without a new call after which the server stops."""

SERVICES: Final = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,
)

OPTIONS: Final[Sequence[tuple[str, Any]]] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
    ("grpc.so_reuseport", 0),
)
"""Peers that do not answer are dropped, and so are connections without a call. Connections have an
age limit, so that load balancers in front can rebalance."""


@dataclass(frozen=True, slots=True)
class Address:
    """Address to listen on; port 0 picks a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RpcServer:
    """The services, health checks and, optionally, reflection, at one address or several.

    Each address has an interceptor, which decides what is served there, and `max_connections`. The
    services, and what their calls share, are the same at all of them.
    """

    def __init__(
        self,
        interceptors: Sequence[Interceptor],
        gate: CallGate,
        max_connections: int,
        with_reflection: bool,
    ) -> None:
        options = (*OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections))
        self._gate = gate
        self._servers = [make_server([each], options) for each in interceptors]
        self._health = HealthService((health.OVERALL_HEALTH, *SERVICES))
        self._reflection = ReflectionService((*SERVICES, health.SERVICE_NAME), gate)
        for server in self._servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            if with_reflection:
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server(self._reflection, server)

    def bind(self, address: Address, tls: ServerTls | None = None, which: int = 0) -> Address:
        """Binds the port for the calls of an interceptor, the first by default.

        Ports are bound early, so that a conflict shows before a model is loaded. Connections are
        encrypted if `tls` is given. Returns the address with the actual port. Raises OSError.
        """
        server = self._servers[which]
        try:
            if tls is None:
                port = server.add_insecure_port(str(address))
            else:
                port = server.add_secure_port(str(address), tls.credentials())
        except RuntimeError:
            port = 0
        if port == 0:
            raise OSError(errno.EADDRINUSE, "is the port in use?")
        return Address(address.host, port)

    def bind_socket(self, target: str) -> None:
        """Listens on a Unix socket (`unix:PATH`) as on the first address. Raises OSError."""
        try:
            self._servers[0].add_insecure_port(target)
        except RuntimeError:
            path = target.removeprefix("unix:")
            raise OSError(errno.EADDRNOTAVAIL, "cannot be bound", path) from None

    async def start(
        self,
        generation: GenerationService,
        adapters: AdapterService,
        training: TrainingService,
        model: ModelService,
        engine: EngineService,
    ) -> None:
        """Starts to accept calls."""
        for server in self._servers:
            generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
            adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, server)
            training_pb2_grpc.add_TrainingServiceServicer_to_server(training, server)
            model_pb2_grpc.add_ModelServiceServicer_to_server(model, server)
            engine_pb2_grpc.add_EngineServiceServicer_to_server(engine, server)
        for server in self._servers:
            await server.start()

    def set_serving(self, serving: bool) -> None:
        """Sets the health of the server and of each service."""
        self._health.set(serving)

    def lame_duck(self) -> None:
        """Reports NOT_SERVING from now on."""
        self._health.close()

    async def stopped(self) -> None:
        """Waits until one of the addresses accepts no calls any more.

        Raises the error that has caused it.
        """
        ends = [asyncio.ensure_future(each.wait_for_termination()) for each in self._servers]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            for end in ends:
                end.cancel()

    async def stop(self, grace_seconds: float) -> None:
        """Stops listening. Calls that do not end within the grace period are cancelled.

        A call that arrives at a gRPC server which is being stopped is CANCELLED, and no client
        tries that again. So new calls are refused until there are none, and only then the server is
        stopped, at once.
        """
        self.lame_duck()
        self._gate.close()
        await self._gate.ended(grace_seconds)
        await self._gate.quiet(QUIET_SECONDS, grace_seconds)
        await asyncio.gather(*(server.stop(0.0) for server in self._servers))
