"""What probes and load balancers ask: `/health`, `/ping`, `/version`, and the series."""

from __future__ import annotations

import asyncio
import urllib.request
from importlib.metadata import version
from typing import Final

from loraplex import HealthStatus, LoraplexError
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError

_METRICS_SECONDS: Final = 10.0
_GENERATION: Final = "loraplex.v1.GenerationService"


def routes(context: Context) -> list[BaseRoute]:
    """The routes for probes. None of them needs a key."""

    async def health(_: Request) -> Response:
        """200 while the server takes requests, 503 otherwise; without a credential, as for gRPC."""
        try:
            status = await context.server.health(_GENERATION)
        except LoraplexError as error:
            text = f"the server does not answer: {error.code.name}"
            raise ApiError(503, text, retry_after=1.0) from None
        if status is not HealthStatus.SERVING:
            raise ApiError(503, f"the server takes no requests: {status}", retry_after=1.0)
        return Response()

    async def versions(_: Request) -> Response:
        return JSONResponse({"version": version("loraplex")})

    async def metrics(_: Request) -> Response:
        """The server's series, if `metrics` names them, and then the gateway's."""
        own = context.metrics.exposition()
        if not (url := context.settings.metrics):
            return Response(own, media_type=CONTENT_TYPE_PLAIN_0_0_4)
        try:
            theirs = await asyncio.to_thread(_fetch, url)
        except OSError as error:
            raise ApiError(503, f"the server's metrics cannot be read: {error}") from None
        return Response(theirs + own, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/version", versions, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _fetch(url: str) -> bytes:
    """The text at an address of the operator's. Raises OSError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=_METRICS_SECONDS) as reply:
        found: bytes = reply.read()
    return found if found.endswith(b"\n") else found + b"\n"
