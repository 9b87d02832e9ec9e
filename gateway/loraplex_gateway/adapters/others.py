"""The adapter endpoints of vLLM, SGLang, AIBrix and Dynamo, for controllers written for these.

All of them register and load, or unload and delete: afterwards `/v1/models` lists the adapter, or
does not. Repeating an order succeeds, since controllers do so until an order has succeeded.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import msgspec
from loraplex import AdapterConflict, LoraplexError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.adapters import describe
from loraplex_gateway.adapters.orders import AdapterOrders, Order
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire import bodies

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_VLLM_TYPES: Final = {400: "InvalidUserInput", 404: "NotFoundError"}
_RESIDENT: Final = "resident"


class VllmLoad(msgspec.Struct):
    """vLLM's order to load an adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class AdapterName(msgspec.Struct):
    """The order of any of the servers to unload an adapter."""

    lora_name: str


class SglangLoad(msgspec.Struct):
    """SGLang's order to load an adapter."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class AibrixLoad(msgspec.Struct):
    """The order of AIBrix's runtime to load an adapter."""

    lora_name: str
    artifact_url: str
    credentials: dict[str, Any] = {}


class DynamoSource(msgspec.Struct):
    """Where Dynamo finds an adapter."""

    uri: str


class DynamoLoad(msgspec.Struct):
    """Dynamo's order to load an adapter."""

    lora_name: str
    source: DynamoSource


# Fields that change nothing here. An adapter says by itself for which base and in which layout its
# weights are, and ids of adapters are texts.
_IGNORED: Final = bodies.HARMLESS | {
    "base_model_name", "is_3d_lora_weight", "lora_int_id", "additional_config", "cleanup_local",
    "added_tokens_config", "model",
}  # fmt: skip


def routes(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    return [
        *_vllm(context, orders),
        *_sglang(context, orders),
        *_aibrix(context, orders),
        *_dynamo(context, orders),
    ]


def _vllm(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    limit = context.settings.max_body_bytes

    async def load(request: Request) -> Response:
        body = await bodies.read(request, VllmLoad, limit, _IGNORED)
        order = Order(body.lora_name, body.load_inplace)
        await orders.register(request, order, body.lora_path, "lora_path")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(request: Request) -> Response:
        body = await bodies.read(request, AdapterName, limit, _IGNORED)
        await orders.remove(request, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return [
        Route("/v1/load_lora_adapter", _answering(load, _as_vllm), methods=["POST"]),
        Route("/v1/unload_lora_adapter", _answering(unload, _as_vllm), methods=["POST"]),
    ]


def _sglang(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    limit = context.settings.max_body_bytes

    async def load(request: Request) -> Response:
        body = await bodies.read(request, SglangLoad, limit, _IGNORED)
        done = await orders.register(request, Order(body.lora_name), body.lora_path, "lora_path")
        if body.pinned:
            await context.client_for(request).pin_adapter(done.adapter.name)
        return await loaded(request)

    async def unload(request: Request) -> Response:
        body = await bodies.read(request, AdapterName, limit, _IGNORED)
        await orders.remove(request, body.lora_name)
        return await loaded(request)

    async def loaded(request: Request) -> Response:
        found = map(describe.adapter, await context.client_for(request).list_adapters())
        there = {a["model"]: a["digest"] for a in found if a["state"] == _RESIDENT}
        body = {"success": True, "error_message": "", "loaded_adapters": there}
        return JSONResponse(body)

    return [
        Route("/load_lora_adapter", _answering(load, _as_sglang), methods=["POST"]),
        Route("/unload_lora_adapter", _answering(unload, _as_sglang), methods=["POST"]),
    ]


def _aibrix(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    limit = context.settings.max_body_bytes

    async def load(request: Request) -> Response:
        body = await bodies.read(request, AibrixLoad, limit, _IGNORED)
        if body.credentials:
            text = "credentials are not taken from requests; set them in the gateway's environment"
            raise ApiError(400, text, param="credentials")
        await orders.register(request, Order(body.lora_name), body.artifact_url, "artifact_url")
        return _done(body.lora_name, "loaded")

    async def unload(request: Request) -> Response:
        body = await bodies.read(request, AdapterName, limit, _IGNORED)
        await orders.remove(request, body.lora_name)
        return _done(body.lora_name, "unloaded")

    return [
        Route("/v1/lora_adapter/load", _answering(load, _as_vllm), methods=["POST"]),
        Route("/v1/lora_adapter/unload", _answering(unload, _as_vllm), methods=["POST"]),
    ]


def _dynamo(context: Context, orders: AdapterOrders) -> list[BaseRoute]:
    limit = context.settings.max_body_bytes

    async def load(request: Request) -> Response:
        body = await bodies.read(request, DynamoLoad, limit, _IGNORED)
        order, uri = Order(body.lora_name), body.source.uri
        await orders.register(request, order, uri, "source.uri")
        return _done(body.lora_name, "loaded")

    async def listed(request: Request) -> Response:
        found = map(describe.adapter, await context.client_for(request).list_adapters())
        loras = {each["model"]: _number(each["model"]) for each in found}
        return JSONResponse({"status": "success", "loras": loras, "count": len(loras)})

    async def unload(request: Request) -> Response:
        model = request.path_params["model"]
        await orders.remove(request, model)
        return _done(model, "unloaded")

    return [
        Route("/v1/loras", _answering(load, _as_vllm), methods=["POST"]),
        Route("/v1/loras", listed, methods=["GET"]),
        Route("/v1/loras/{model:path}", _answering(unload, _as_vllm), methods=["DELETE"]),
    ]


def _answering(handle: Handler, shape: Callable[[ApiError], Response]) -> Handler:
    """A handler whose failures have the shape that its callers know."""

    async def answer(request: Request) -> Response:
        try:
            return await handle(request)
        except AdapterConflict as error:
            text = f"{error.message}: another adapter of this name has already been loaded. "
            text += "If you want to load the adapter in place, set 'load_inplace' to True."
            return shape(ApiError(400, text, param="lora_name", code="adapter_conflict"))
        except ApiError as error:
            return shape(_named(error))
        except LoraplexError as error:
            return shape(_named(errors.of(error)))

    return answer


def _named(error: ApiError) -> ApiError:
    """The error with the name that these requests have for an adapter's id."""
    if error.param in ("name", "model"):
        error.param = "lora_name"
    return error


def _as_vllm(error: ApiError) -> Response:
    """Today's shape of vLLM and its former one, whose fields are at the top, in one body."""
    kind = _VLLM_TYPES.get(error.status, error.type)
    fields = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.status,
    }
    body = {"error": fields, "object": "error", **fields}
    return JSONResponse(body, error.status, error.headers)


def _as_sglang(error: ApiError) -> Response:
    """SGLang's shape; it knows no other refusal than 400, and credentials keep their status."""
    status = 400 if error.status in (404, 409) else error.status
    body = {"success": False, "error_message": error.message, **error.body}
    return JSONResponse(body, status, error.headers)


def _done(model: str, what: str) -> Response:
    message = f"LoRA adapter '{model}' {what} successfully"
    body = {"status": "success", "message": message, "lora_name": model, "lora_id": _number(model)}
    return JSONResponse(body)


def _number(model: str) -> int:
    """A number for an id, always the same, for programs that expect one."""
    return zlib.crc32(model.encode()) & 0x7FFFFFFF or 1
