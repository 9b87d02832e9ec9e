"""The gateway as an ASGI application: every part's routes, and what holds for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from loraplex import LoraplexError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from loraplex_gateway import adapters, errors, health
from loraplex_gateway.chat import routes as chat
from loraplex_gateway.completions import routes as completions
from loraplex_gateway.console import routes as console
from loraplex_gateway.context import Context
from loraplex_gateway.embeddings import routes as embeddings
from loraplex_gateway.engine import routes as engine
from loraplex_gateway.errors import ApiError
from loraplex_gateway.files import routes as files
from loraplex_gateway.finetuning import routes as finetuning
from loraplex_gateway.metrics import Observed
from loraplex_gateway.models import routes as models
from loraplex_gateway.places import FreesPlaces
from loraplex_gateway.responses import routes as responses
from loraplex_gateway.settings import GatewaySettings
from loraplex_gateway.tokens import routes as tokens
from loraplex_gateway.wire.origins import SiteGuard

PARTS: Final[tuple[Callable[[Context], list[BaseRoute]], ...]] = (
    health.routes,
    models.routes,
    files.routes,
    finetuning.routes,
    chat.routes,
    completions.routes,
    responses.routes,
    embeddings.routes,
    tokens.routes,
    adapters.routes,
    engine.routes,
    console.routes,
)
"""The parts of the interface. Each returns its routes."""

SHOWN_HEADERS: Final = ("x-request-id", "x-loraplex-adapter", "retry-after", "retry-after-ms")
"""Headers that pages of other origins may read."""


def build(settings: GatewaySettings) -> Starlette:
    """The application for `settings`. Raises SettingsError, and InvalidRequest for files of TLS."""
    settings.check()
    context = Context(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await context.close()

    routes = [route for part in PARTS for route in part(context)]
    middleware = [
        Middleware(Observed, metrics=context.metrics),
        Middleware(FreesPlaces, places=context.places),
        Middleware(SiteGuard, settings=settings),
    ]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                # OpenAI's client in a browser sends a dozen headers that say what it runs on.
                allow_headers=["*"],
                expose_headers=SHOWN_HEADERS,
            )
        )
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            LoraplexError: _server_error,
            HTTPException: _http_error,
        },
        lifespan=lifespan,
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "the handler of ApiError"
    return error.response()


async def _server_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoraplexError), "the handler of LoraplexError"
    return errors.of(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the routing itself: no such path, or another method."""
    assert isinstance(error, HTTPException), "the handler of HTTPException"
    text = f"{request.method[:16]} {request.url.path[:256]}: {error.detail}"
    response = ApiError(error.status_code, text).response()
    response.headers.update(error.headers or {})
    return response
