"""What all routes share: the settings, the connection to the server, and who calls."""

from __future__ import annotations

from typing import Final

from loraplex import AsyncClient
from starlette.requests import HTTPConnection

from loraplex_gateway.errors import ApiError
from loraplex_gateway.models.ids import ModelIds
from loraplex_gateway.settings import GatewaySettings

_PASSED_ON: Final = ("traceparent", "tracestate")


class Context:
    """The settings, and clients of the server that act for the callers of HTTP.

    Attributes:
        settings: the settings.
        ids: the ids of models.
        server: a client that carries no key, for what needs none.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        access: dict[str, object] = {"key": ""}
        if settings.tls or settings.ca is not None or settings.server_name:
            access |= {"tls": True}
            access |= {"ca": settings.ca} if settings.ca is not None else {}
            access |= {"server_name": settings.server_name} if settings.server_name else {}
        self.server = AsyncClient(
            settings.target,
            timeout=settings.request_seconds,
            **access,  # type: ignore[arg-type]
        )
        self.ids = ModelIds(settings.served_names)

    def client_for(self, request: HTTPConnection) -> AsyncClient:
        """A client whose calls carry the caller's key and trace.

        The server decides what the key allows. Raises ApiError (401) for a credential of another
        scheme than Bearer, and InvalidRequest for one that is no key.
        """
        headers = request.headers
        trace = tuple((name, headers[name]) for name in _PASSED_ON if name in headers)
        return self.server.for_caller(bearer(request), trace)

    async def close(self) -> None:
        await self.server.close()


def bearer(request: HTTPConnection) -> str:
    """The caller's key; "" without one. Raises ApiError (401)."""
    text = request.headers.get("authorization", "").strip()
    if not text:
        return ""
    scheme, _, key = text.partition(" ")
    if scheme.lower() != "bearer":
        raise ApiError(401, "give the key as `Authorization: Bearer KEY`", code="invalid_api_key")
    return key.strip()
