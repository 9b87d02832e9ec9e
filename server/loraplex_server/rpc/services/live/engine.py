"""EngineService: the state of the engine, several times a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_server.access.principals import caller
from loraplex_server.engine.group.face import Engine
from loraplex_server.registry.feed import AdapterFeed
from loraplex_server.registry.view import View
from loraplex_server.rpc.calls.errors import invalid
from loraplex_server.rpc.calls.gate import CallGate
from loraplex_server.rpc.services.live.batch import BatchLooks, batch_of
from loraplex_server.rpc.services.live.in_flight import InFlight

MAX_WATCHES: Final = 64
"""Watches of the engine at once, of all callers."""

DEFAULT_SECONDS: Final = 0.25
LEAST_SECONDS, MOST_SECONDS = 0.1, 60.0
"""Bounds of the time between two messages."""

_Context = grpc.aio.ServicerContext[Any, Any]


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """The service of loraplex/v1/engine.proto."""

    def __init__(
        self, engine: Engine, feed: AdapterFeed, in_flight: InFlight, gate: CallGate
    ) -> None:
        self._looks = BatchLooks(engine)
        self._feed = feed
        self._in_flight = in_flight
        self._gate = gate
        self._watches = 0

    async def WatchEngine(
        self, request: engine_pb2.WatchEngineRequest, context: _Context
    ) -> AsyncGenerator[engine_pb2.WatchEngineResponse, None]:
        """Streams the state. Each message is made when the one before it has been written."""
        seconds = _interval(request)
        if self._watches >= MAX_WATCHES:
            text = f"{self._watches} calls watch the engine already; try again later"
            raise Refusal(Reason.OVERLOADED, text)
        principal, feed = caller(), self._feed
        view, loop = View.of(principal), asyncio.get_running_loop()
        self._watches += 1
        try:
            with feed.followed():
                due = loop.time()
                while True:
                    taken = await self._until_draining(self._looks.newest())
                    residents = await self._until_draining(feed.residents(view))
                    yield batch_of(taken, self._in_flight, principal, residents)
                    due = max(due + seconds, loop.time())
                    await self._until_draining(asyncio.sleep(due - loop.time()))
        finally:
            self._watches -= 1

    async def _until_draining(self, work: Any) -> Any:
        return await self._gate.before_draining(work, "the server is shutting down")


def _interval(request: engine_pb2.WatchEngineRequest) -> float:
    """Seconds between two messages. Raises Refusal(FIELD_INVALID)."""
    if not request.HasField("interval"):
        return DEFAULT_SECONDS
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        text = f"must be {LEAST_SECONDS:g} to {MOST_SECONDS:g} seconds"
        raise invalid([Problem("interval", text)])
    return float(seconds)
