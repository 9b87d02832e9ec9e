"""Sets and deletes aliases."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.adapters import describe
from loraplex_gateway.context import Context
from loraplex_gateway.wire import bodies


class AliasTarget(msgspec.Struct):
    """What an alias is to point to, and what it must point to now."""

    adapter: str
    expected: str | None = None


def routes(context: Context) -> list[BaseRoute]:
    async def set_alias(request: Request) -> Response:
        target = await bodies.read(request, AliasTarget, context.settings.max_body_bytes)
        client, alias = context.client_for(request), request.path_params["alias"]
        found = await client.set_alias(alias, target.adapter, expected=target.expected)
        context.ids.forget()
        return JSONResponse(describe.adapter(found))

    async def delete_alias(request: Request) -> Response:
        alias = request.path_params["alias"]
        await context.client_for(request).delete_alias(alias)
        context.ids.forget()
        return JSONResponse(describe.deleted(alias, "alias"))

    return [
        Route("/v1/aliases/{alias}", set_alias, methods=["PUT"]),
        Route("/v1/aliases/{alias}", delete_alias, methods=["DELETE"]),
    ]
