"""What all routes share: the settings, the connections to the server, and who calls."""

from __future__ import annotations

import itertools
from typing import Any, Final

from loraplex import AsyncClient, LoraplexError
from loraplex.access.targets import stays_on_this_machine
from starlette.requests import HTTPConnection

from loraplex_gateway.errors import ApiError
from loraplex_gateway.metrics import GatewayMetrics
from loraplex_gateway.models.ids import ModelIds
from loraplex_gateway.settings import GatewaySettings

CONNECTIONS: Final = 4
"""Connections for callers' requests. The server takes 256 calls at once on each."""

_PASSED_ON: Final = ("traceparent", "tracestate")


class Context:
    """The settings, and clients of the server that act for the callers of HTTP.

    Attributes:
        settings: the settings.
        ids: the ids of models.
        metrics: the gateway's own series.
        server: a client that carries no key, for what needs none. It has a connection of its own,
            so that health is answered while callers use up theirs.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.ids = ModelIds(settings.served_names)
        self.metrics = GatewayMetrics()
        encryption = _encryption(settings)
        self._is_private = bool(encryption) or stays_on_this_machine(settings.target)
        self.server, *self._clients = (
            AsyncClient(settings.target, timeout=settings.request_seconds, key="", **encryption)
            for _ in range(1 + CONNECTIONS)
        )
        self._turns = itertools.cycle(self._clients)

    def client_for(self, request: HTTPConnection) -> AsyncClient:
        """A client whose calls carry the caller's key and trace.

        The server decides what the key allows. Raises ApiError: 401 for what is no key, 500 if keys
        cannot be passed on because the connection to the server is not encrypted.
        """
        headers, key = request.headers, bearer(request)
        if key and not self._is_private:
            text = "the gateway's connection to the server is not encrypted, so it sends no keys"
            raise ApiError(500, text, code="keys_not_sent", should_retry=False)
        trace = tuple((name, headers[name]) for name in _PASSED_ON if name in headers)
        try:
            return next(self._turns).for_caller(key, trace)
        except LoraplexError:
            text = "the key is no key: a key is one word of visible ASCII characters"
            raise ApiError(401, text, code="invalid_api_key") from None

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
