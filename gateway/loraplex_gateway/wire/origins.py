"""Keeps pages of other sites from using a gateway through the browsers of those who reach it.

Such a page can send forms and requests without a body anywhere, and it can give its own name the
address of this machine, so that the browser takes the gateway for a part of the page's own site.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_gateway.errors import ApiError
from loraplex_gateway.settings import GatewaySettings, is_loopback

_READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_RESERVED: Final = (".localhost", ".internal")
"""Ends of names that nobody can have in the public system of names."""


class SiteGuard:
    """Refuses requests under names that are not the gateway's, and changes by pages of others.

    The names of a gateway that listens on this machine alone are `localhost`, addresses, and those
    in `allowed_hosts`; one that others reach has any name, unless `allowed_hosts` are given. An
    address cannot be made to mean another machine. Answers tell browsers to trust their types.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.cors_origins)
        self._names: Sequence[str] = tuple(name.lower() for name in settings.allowed_hosts)
        self._is_open = not self._names and not is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def typed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
            await send(message)

        refused = self._refusal(scope["method"], Headers(scope=scope))
        await (refused.response() if refused else self._app)(scope, receive, typed)

    def _refusal(self, method: str, headers: Headers) -> ApiError | None:
        """The error for a request that is not for this gateway, or that another site's page sent"""
        host = headers.get("host", "").lower()
        if not self._is_open and host and not self._is_own(host):
            text = "the gateway is not known by the name in the header host; see --allowed-host"
            return ApiError(421, text, code="host_not_allowed", should_retry=False)
        origin = headers.get("origin", "").lower()
        if method in _READING or not origin or "*" in self._origins or origin in self._origins:
            return None
        # Browsers say so themselves, also behind a proxy that has changed the host; pages cannot.
        if origin.partition("://")[2] == host or headers.get("sec-fetch-site") == "same-origin":
            return None
        text = "pages of other origins must not call the gateway; see --cors-origin"
        return ApiError(403, text, code="origin_not_allowed", should_retry=False)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.rstrip(".")
        return name in self._names or name.endswith(_RESERVED) or _is_fixed(name)


def _is_fixed(name: str) -> bool:
    """Whether a name means the same machine, whoever answers for names."""
    if name == "localhost":
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
