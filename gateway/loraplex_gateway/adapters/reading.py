"""Looks up, lists and watches adapters."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from loraplex import AdapterEvent, AdapterTable, AsyncClient
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.adapters import describe
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire.events import EventStream, event


def routes(context: Context) -> list[BaseRoute]:
    async def listed(request: Request) -> Response:
        labels = labels_of(request.query_params.getlist("label"))
        found = await context.client_for(request).list_adapters(labels=labels)
        return JSONResponse(describe.many(found))

    async def one(request: Request) -> Response:
        found = await context.client_for(request).get_adapter(request.path_params["adapter"])
        return JSONResponse(describe.adapter(found))

    async def versions(request: Request) -> Response:
        found = await context.client_for(request).list_versions(request.path_params["adapter"])
        return JSONResponse(describe.many(found))

    async def watched(request: Request) -> Response:
        return EventStream(changes(context.client_for(request)), last=b"")

    async def all_aliases(request: Request) -> Response:
        aliases = await _aliases(context.client_for(request))
        data = [{"alias": alias, "adapter": at} for alias, at in sorted(aliases.items())]
        return JSONResponse({"object": "list", "data": data})

    return [
        Route("/v1/adapters", listed, methods=["GET"]),
        Route("/v1/adapters/{adapter}", one, methods=["GET"]),
        Route("/v1/adapters/{adapter}/versions", versions, methods=["GET"]),
        Route("/v1/adapter_events", watched, methods=["GET"]),
        Route("/v1/aliases", all_aliases, methods=["GET"]),
    ]


def labels_of(terms: list[str]) -> dict[str, str]:
    """Labels written as `KEY=VALUE`. Raises ApiError (400)."""
    found = {}
    for term in terms:
        key, separator, value = term.partition("=")
        if not key or not separator:
            raise ApiError(400, "label: write KEY=VALUE", param="label")
        found[key] = value
    return found


async def changes(client: AsyncClient) -> AsyncGenerator[bytes, None]:
    """The table of adapters and its changes as events."""
    async with client.watch_adapters() as items:
        async for item in items:
            yield event(_described(item), "table" if isinstance(item, AdapterTable) else "change")


def _described(item: AdapterTable | AdapterEvent) -> dict[str, Any]:
    if isinstance(item, AdapterTable):
        adapters = [describe.adapter(info) for info in item.adapters]
        return {"adapters": adapters, "aliases": dict(item.aliases), "resync": item.resync}
    found: dict[str, Any] = msgspec.to_builtins(item)
    return {**found, "adapter": describe.adapter(item.adapter)}


async def _aliases(client: AsyncClient) -> dict[str, str]:
    """All aliases: the watch begins with them, and no call lists them alone."""
    async with client.watch_adapters() as items:
        async for item in items:
            if isinstance(item, AdapterTable):
                return dict(item.aliases)
    return {}
