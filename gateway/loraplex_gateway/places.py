"""Places for requests: how many calls of the server the gateway makes at a time.

A connection of gRPC carries a bounded number of calls. Further ones would wait inside of it,
without an answer and for as long as the calls before them take. So a request that calls the server
holds a place on a connection until it is answered, and one without a free place is refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from loraplex import AsyncClient
from starlette.types import ASGIApp, Receive, Scope, Send

CALLS_PER_CONNECTION: Final = 224
"""Places on one connection. The server takes 256 calls on it; the others are for the short calls
that a request makes beside its long one."""

LEAST_CONNECTIONS: Final = 4
"""Connections of a gateway with few places, which its requests share evenly."""

_HELD: Final = "loraplex_gateway.places"


class CallPlaces:
    """The places of all connections, and who holds them.

    Attributes:
        most: number of places.
        taken: number of those that requests hold.
        connections: number of connections that the places need.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self.connections = max(LEAST_CONNECTIONS, -(-most // CALLS_PER_CONNECTION))
        self._by_connection = [0] * self.connections
        self._turn = 0

    def take(self, scope: Scope) -> int | None:
        """Takes a place for a request; returns the connection that it is on.

        Returns None if there is none. A request that has a place already is given that one again.
        """
        held = scope.get(_HELD)
        if held:
            first: int = held[0]
            return first
        return self._take(scope) if self.taken < self.most else None

    def take_more(self, scope: Scope, wanted: int) -> list[int]:
        """Takes up to `wanted` further places for a request that has several calls to make.

        Half of all places are left to requests that need one.
        """
        free = self.most // 2 - self.taken
        return [self._take(scope) for _ in range(min(wanted, free))]

    def give_back(self, scope: Scope) -> None:
        """Frees the places of a request. Idempotent."""
        for connection in scope.pop(_HELD, ()):
            self._by_connection[connection] -= 1
            self.taken -= 1

    def _take(self, scope: Scope) -> int:
        """Takes a place on the connection with the fewest; of several, each in its turn."""
        count = self.connections
        order = [(self._turn + i) % count for i in range(count)]
        connection = min(order, key=self._by_connection.__getitem__)
        self._turn = (connection + 1) % count
        self._by_connection[connection] += 1
        self.taken += 1
        scope.setdefault(_HELD, []).append(connection)
        return connection


class FreesPlaces:
    """Frees the places of each request once it has been answered, or given up."""

    def __init__(self, app: ASGIApp, places: CallPlaces) -> None:
        self._app = app
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            self._places.give_back(scope)


class ClientsInTurn:
    """Clients of which each makes one call at a time."""

    def __init__(self, clients: Sequence[AsyncClient]) -> None:
        self.count = len(clients)
        self._free: asyncio.Queue[AsyncClient] = asyncio.Queue()
        for client in clients:
            self._free.put_nowait(client)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[AsyncClient]:
        """Waits for a client that is free; it is busy within the block."""
        client = await self._free.get()
        try:
            yield client
        finally:
            self._free.put_nowait(client)
