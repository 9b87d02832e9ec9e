"""What all routes share: the settings, the connections to the server, and who calls."""

from __future__ import annotations

from typing import Any, Final

from loraplex import AsyncClient, LoraplexError
from loraplex.access.targets import stays_on_this_machine
from starlette.requests import HTTPConnection

from loraplex_gateway.connections import IS_SPARE
from loraplex_gateway.errors import ApiError
from loraplex_gateway.metrics import GatewayMetrics
from loraplex_gateway.models.ids import ModelIds
from loraplex_gateway.places import CallPlaces
from loraplex_gateway.settings import GatewaySettings

BUSY_SECONDS: Final = 1.0
"""Pause after which a request may be repeated that was refused because of too many others."""

_PASSED_ON: Final = ("traceparent", "tracestate")


class Context:
    """The settings, and clients of the server that act for the callers of HTTP.

    Attributes:
        settings: the settings.
        ids: the ids of models.
        metrics: the gateway's own series.
        places: those of the requests that call the server.
        server: a client that carries no key, for what needs none. It has a connection of its own,
            so that health is answered while callers use up theirs.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.ids = ModelIds(settings.served_names)
        self.places = CallPlaces(settings.max_requests)
        self.metrics = GatewayMetrics(self.places)
        encryption = _encryption(settings)
        self._is_private = bool(encryption) or stays_on_this_machine(settings.target)
        self.server, *self._clients = (
            AsyncClient(settings.target, timeout=settings.request_seconds, key="", **encryption)
            for _ in range(1 + self.places.connections)
        )

    def client_for(self, request: HTTPConnection) -> AsyncClient:
        """A client whose calls carry the caller's key and trace.

        The request holds a place on a connection to the server until it is answered. The server
        decides what the key allows. Raises ApiError: 401 for what is no key, 500 if keys cannot be
        passed on because the connection to the server is not encrypted, 503 without a free place.
        """
        key = bearer(request)
        if key and not self._is_private:
            text = "the gateway's connection to the server is not encrypted, so it sends no keys"
            raise ApiError(500, text, code="keys_not_sent", should_retry=False)
        is_spare = IS_SPARE in request.scope
        place = None if is_spare else self.places.take(request.scope)
        if place is None:
            raise self._busy(is_spare)
        return self._client(place, request)

    def more_clients(self, request: HTTPConnection, wanted: int) -> list[AsyncClient]:
        """Up to `wanted` further clients for a request that has one, as there are free places."""
        return [
            self._client(place, request) for place in self.places.take_more(request.scope, wanted)
        ]

    def _client(self, place: int, request: HTTPConnection) -> AsyncClient:
        headers = request.headers
        trace = tuple((name, headers[name]) for name in _PASSED_ON if name in headers)
        try:
            return self._clients[place].for_caller(bearer(request), trace)
        except LoraplexError:
            text = "the key is no key: a key is one word of visible ASCII characters"
            raise ApiError(401, text, code="invalid_api_key") from None

    def _busy(self, is_spare: bool) -> ApiError:
        """The error for a request that came when there were too many; it is counted."""
        self.metrics.refused.inc()
        most, what = self.settings.max_requests, "requests"
        if is_spare:
            most, what = self.settings.max_connections, "connections"
        text = f"the gateway serves {most} {what} at a time; try again later"
        return ApiError(503, text, code="overloaded", retry_after=BUSY_SECONDS)

    async def close(self) -> None:
        """Closes the connections; running calls are cancelled."""
        for client in (self.server, *self._clients):
            await client.close()


def bearer(request: HTTPConnection) -> str:
    """The caller's key; "" without one. Raises ApiError (401)."""
    text = request.headers.get("authorization", "").strip()
    if not text:
        return ""
    scheme, _, key = text.partition(" ")
    if scheme.lower() != "bearer":
        raise ApiError(401, "give the key as `Authorization: Bearer KEY`", code="invalid_api_key")
    return key.strip()


def _encryption(settings: GatewaySettings) -> dict[str, Any]:
    """The client's options of an encrypted connection; empty if it is not to be encrypted."""
    given = {"ca": settings.ca, "server_name": settings.server_name}
    found = {name: value for name, value in given.items() if value}
    return {"tls": True, **found} if settings.tls or found else {}
