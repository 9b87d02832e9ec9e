"""The gateway as an ASGI application: every part's routes, and what holds for all of them."""

from __future__ import annotations

import contextlib
import logging
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

from loraplex_gateway import errors, health
from loraplex_gateway.console import routes as console
from loraplex_gateway.context import Context
from loraplex_gateway.engine import routes as engine
from loraplex_gateway.errors import ApiError
from loraplex_gateway.models import routes as models
from loraplex_gateway.settings import Settings

log = logging.getLogger(__name__)

PARTS: Final[tuple[Callable[[Context], list[BaseRoute]], ...]] = (
    health.routes,
    models.routes,
    engine.routes,
    console.routes,
)
"""The parts of the interface. Each returns its routes."""


def build(settings: Settings) -> Starlette:
    """The application for `settings`. Raises SettingsError."""
    settings.check()
    context = Context(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await context.close()

    middleware = []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["authorization", "content-type"],
            )
        )
    return Starlette(
        routes=[route for part in PARTS for route in part(context)],
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            LoraplexError: _server_error,
            HTTPException: _http_error,
            Exception: _fault,
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
    text = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, text).response()
    response.headers.update(error.headers or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of the gateway; neither the answer nor the log has the request's content."""
    where = type(error).__name__
    log.error("%s %s failed: %s", request.method, request.url.path, where, exc_info=_bare(error))
    return ApiError(500, "internal error of the gateway", should_retry=False).response()


def _bare(error: BaseException) -> BaseException:
    """An error of the same traceback without its text, which may quote what was sent."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)
