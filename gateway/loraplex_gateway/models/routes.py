"""`/v1/models`: the base first, then the adapters that the caller sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from loraplex import AdapterInfo, AsyncClient, ModelDescription, NotFound
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.context import Context, bearer
from loraplex_gateway.models.ids import FOREIGN_ID

OWNER: Final = "loraplex"


def routes(context: Context) -> list[BaseRoute]:
    """The routes of models."""
    started = int(time.time())

    async def listed(request: Request) -> Response:
        client = context.client_for(request)
        return JSONResponse({"object": "list", "data": await _cards(context, client, started)})

    async def one(request: Request) -> Response:
        client, model = context.client_for(request), request.path_params["model"]
        adapter = await context.ids.adapter(client, model, bearer(request))
        if not adapter:
            # Not from memory, so that only callers that the server knows are answered.
            base = _base_card(model, await client.get_model(), started)
            return JSONResponse(base)
        try:
            info = await client.get_adapter(adapter)
        except NotFound:
            raise errors.not_found(model) from None
        base = _base_card(
            await context.ids.base_id(client), await context.ids.base(client), started
        )
        return JSONResponse(_card(model, info, base))

    return [
        Route("/v1/models", listed, methods=["GET"]),
        Route("/v1/models/{model:path}", one, methods=["GET"]),
    ]


async def _cards(context: Context, client: AsyncClient, started: int) -> list[dict[str, Any]]:
    """The cards of the base, of its other names, of the adapters, and of their aliases.

    An alias of a version that is not the adapter's current one works, too, but is not listed.
    """
    adapters = await client.list_adapters()
    base = await context.ids.base(client)
    first = _base_card(await context.ids.base_id(client), base, started)
    cards = [first, *({**first, "id": name} for name in context.settings.served_names[1:])]
    for info in adapters:
        cards += _of(info, first)
    return cards


def _base_card(model: str, base: ModelDescription, started: int) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": started,
        "owned_by": OWNER,
        "root": base.name,
        "parent": None,
        "max_model_len": base.max_context,
    }


def _of(info: AdapterInfo, base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cards of an adapter: under its own id, and under each alias."""
    yield _card(info.labels.get(FOREIGN_ID) or info.name, info, base)
    for alias in info.aliases:
        yield _card(alias, info, base)


def _card(model: str, info: AdapterInfo, base: dict[str, Any]) -> dict[str, Any]:
    created = int(info.create_time.timestamp()) if info.create_time else base["created"]
    return {
        **base,
        "id": model,
        "created": created,
        "root": info.name,
        "parent": base["id"],
    }
