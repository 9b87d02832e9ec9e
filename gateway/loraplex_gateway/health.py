"""What probes and load balancers ask: `/health`, `/ping`, `/version`, and the server's metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from importlib.metadata import version
from typing import Final

from loraplex import HealthStatus, LoraplexError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError

_METRICS_SECONDS: Final = 10.0
_GENERATION: Final = "loraplex.v1.GenerationService"


def routes(context: Context) -> list[BaseRoute]:
    async def health(_: Request) -> Response:
        """200 while the server takes requests, 503 otherwise; without a credential, as for gRPC."""
        try:
            status = await context.server.health(_GENERATION)
        except LoraplexError as error:
            raise ApiError(503, f"the server does not answer: {error.code.name}") from None
        if status is not HealthStatus.SERVING:
            raise ApiError(503, f"the server takes no requests: {status}")
        return Response()

    async def versions(_: Request) -> Response:
        return JSONResponse({"version": version("loraplex")})

    async def metrics(_: Request) -> Response:
        url = context.settings.metrics
        if not url:
            raise ApiError(404, "metrics are not passed on; set metrics to the server's address")
        try:
            text, kind = await asyncio.to_thread(_fetch, url)
        except OSError as error:
            raise ApiError(503, f"the server's metrics cannot be read: {error}") from None
        return Response(text, media_type=kind)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/version", versions, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _fetch(url: str) -> tuple[bytes, str]:
    """The body at an address of the operator's, and its type."""
    with urllib.request.urlopen(url, timeout=_METRICS_SECONDS) as reply:
        return reply.read(), reply.headers.get("content-type", "text/plain; charset=utf-8")
