"""Registers adapters, changes their names and labels, and moves them to the device and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec
from loraplex import AdapterInfo, AsyncClient
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.adapters import describe, uploading
from loraplex_gateway.adapters.orders import AdapterOrders, Order
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire import bodies

_UPLOAD: Final = "multipart/form-data"


class RegistrationBody(msgspec.Struct):
    """A registration from a folder or a URI."""

    source: str
    name: str = ""
    replace: bool = False
    load: bool = False
    labels: dict[str, str] = {}
    chat_template: str = ""
    eos_token_ids: list[Annotated[int, Meta(ge=0, lt=1 << 32)]] = []
    validate_only: bool = False


class UnloadBody(msgspec.Struct):
    """What happens to the requests that use an adapter."""

    force: bool = False
    drain_seconds: float | None = None


class LabelBody(msgspec.Struct):
    """Labels to set, and keys of labels to remove."""

    set: dict[str, str] = {}
    remove: list[str] = []


def routes(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    return [*_naming(context, orders), *_moving(context)]


def _naming(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    """Registers and deletes adapters, and changes their labels."""
    limit = context.settings.max_body_bytes

    async def register(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == _UPLOAD:
            return await uploading.receive(context, orders, request)
        body = await bodies.read(request, RegistrationBody, limit)
        if body.validate_only:
            report = await orders.validate(request, body.source, "source")
            return JSONResponse(describe.validation(report))
        order = Order(
            body.name,
            body.replace,
            body.load,
            labels=body.labels,
            chat_template=body.chat_template,
            eos_token_ids=tuple(body.eos_token_ids),
        )
        done = await orders.register(request, order, body.source, "source")
        return JSONResponse(describe.registration(done), 201 if done.created else 200)

    async def delete(request: Request) -> Response:
        name = request.path_params["adapter"]
        await context.client_for(request).delete_adapter(name)
        context.ids.forget()
        return JSONResponse(describe.deleted(name, "adapter"))

    async def delete_model(request: Request) -> Response:
        model = request.path_params["model"]
        await orders.remove(request, model)
        return JSONResponse(describe.deleted(model, "model"))

    async def label(request: Request) -> Response:
        body = await bodies.read(request, LabelBody, limit)
        client, adapter = context.client_for(request), request.path_params["adapter"]
        found = await client.label_adapter(adapter, body.set, remove=body.remove)
        context.ids.forget()
        return JSONResponse(describe.adapter(found))

    return [
        Route("/v1/adapters", register, methods=["POST"]),
        Route("/v1/adapters/{adapter}", delete, methods=["DELETE"]),
        Route("/v1/adapters/{adapter}/labels", label, methods=["POST"]),
        Route("/v1/models/{model:path}", delete_model, methods=["DELETE"]),
    ]


def _moving(context: Context) -> list[BaseRoute]:
    """Moves adapters between the store and the device."""
    limit = context.settings.max_body_bytes

    async def unload(request: Request) -> Response:
        data = await bodies.body_of(request, limit)
        body = bodies.convert(bodies.loads(data) if data.strip() else {}, UnloadBody)
        client, adapter = context.client_for(request), request.path_params["adapter"]
        seconds = body.drain_seconds
        if seconds is not None and not 0 <= seconds <= 86_400:
            raise ApiError(400, "drain_seconds is from 0 to 86400", param="drain_seconds")
        found = await client.unload_adapter(adapter, force=body.force, drain=seconds)
        return JSONResponse(describe.adapter(found))

    def moves(action: str, move: Callable[[AsyncClient, str], Awaitable[AdapterInfo]]) -> Route:
        """The route of an action that needs nothing but the adapter."""

        async def handle(request: Request) -> Response:
            await bodies.body_of(request, limit)
            found = await move(context.client_for(request), request.path_params["adapter"])
            return JSONResponse(describe.adapter(found))

        return Route(f"/v1/adapters/{{adapter}}/{action}", handle, methods=["POST"])

    async def restore(client: AsyncClient, name: str) -> AdapterInfo:
        try:
            return await client.restore_adapter(name)
        finally:
            context.ids.forget()

    return [
        Route("/v1/adapters/{adapter}/unload", unload, methods=["POST"]),
        moves("load", lambda client, name: client.load_adapter(name)),
        moves("pin", lambda client, name: client.pin_adapter(name)),
        moves("unpin", lambda client, name: client.unpin_adapter(name)),
        moves("merge", lambda client, name: client.merge_adapter(name)),
        moves("unmerge", lambda client, name: client.unmerge_adapter(name)),
        moves("restore", restore),
    ]
