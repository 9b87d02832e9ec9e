"""grpc.health.v1: the state of the server and of each of its services.

The servicer of the package grpcio-health-checking writes to its watchers under a lock that changes
of the state need too, so one watcher that does not read stops every change. Here a change is one
assignment, and each watcher is sent the newest state once its last message has been written.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2
from loraplex_model.base.refusal import Reason, Refusal

MAX_HEALTH_WATCHERS: Final = 8
"""Most watches on one connection. Clients of several servers hold one on each of their connections,
for as long as these last, so all of them together are bounded by the number of connections only."""

_Context = grpc.aio.ServicerContext[Any, Any]
_Response = health_pb2.HealthCheckResponse


class HealthService:
    """The state of `services`, of which "" is the whole server; NOT_SERVING at first.

    Once closed, the state stays NOT_SERVING. All methods must be called on the event loop.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._closed = False
        self._watchers: set[asyncio.Event] = set()
        self._by_peer: Counter[str] = Counter()

    def set(self, serving: bool) -> None:
        """Sets the state of every service; ignored once closed."""
        self._serving = serving and not self._closed
        self._wake()

    def close(self) -> None:
        """Sets NOT_SERVING for good. Watchers receive the state, and then their calls end."""
        self._closed = True
        self.set(False)

    def __len__(self) -> int:
        """Number of watchers."""
        return len(self._watchers)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """Reports the state of one service; NOT_FOUND for an unknown one."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return _Response(status=self._status(request.service))

    async def List(
        self, request: health_pb2.HealthListRequest, context: _Context
    ) -> health_pb2.HealthListResponse:
        """Reports the state of every service."""
        found = {name: _Response(status=self._status(name)) for name in sorted(self._services)}
        return health_pb2.HealthListResponse(statuses=found)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Streams the state of one service now and after each change, until `close`.

        A watcher that reads slowly receives the newest state only. Raises Refusal: OVERLOADED,
        DRAINING at the end.
        """
        peer = context.peer()  # an address and a port, and so a connection
        if self._by_peer[peer] >= MAX_HEALTH_WATCHERS:
            text = f"{MAX_HEALTH_WATCHERS} calls on this connection watch the health already"
            raise Refusal(Reason.OVERLOADED, text)
        changed = asyncio.Event()
        self._watchers.add(changed)
        self._by_peer[peer] += 1
        try:
            sent = None
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != sent:
                    yield _Response(status=status)
                    sent = status
                elif self._closed:
                    raise Refusal(Reason.DRAINING, "the server is shutting down")
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._serving else _Response.NOT_SERVING

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()
