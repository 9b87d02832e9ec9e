"""The route of embeddings."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex import LoraplexError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.context import Context, bearer
from loraplex_gateway.embeddings.request import EmbeddingRequest, inputs_of
from loraplex_gateway.errors import REQUEST_ID
from loraplex_gateway.generation.answers import ADAPTER_HEADER, adapter_header, request_id_of
from loraplex_gateway.wire.bodies import invalid, read
from loraplex_gateway.wire.events import unless_gone
from loraplex_gateway.wire.replies import reply


def routes(context: Context) -> list[BaseRoute]:
    """The route of embeddings."""

    async def embed(request: Request) -> Response:
        client = context.client_for(request)
        body = await read(request, EmbeddingRequest, context.settings.max_body_bytes)
        inputs = inputs_of(body.input, body.pooling)
        adapter = await context.ids.adapter(client, body.model, bearer(request))
        request_id = request_id_of(request, body.request_id)
        try:
            call = client.embed(**inputs, adapter=adapter or None, request_id=request_id)
            found = await unless_gone(request, call)
        except LoraplexError as error:
            if error.reason == "ADAPTER_NOT_FOUND":
                raise errors.not_found(body.model, error.request_id) from None
            raise errors.of(error, _params(body.input)) from None
        size = len(found.vectors[0].values)
        if body.dimensions is not None and body.dimensions != size:
            raise invalid("dimensions", f"cannot be chosen: the model's vectors have {size}")
        tokens = sum(each.tokens for each in found.vectors)
        vectors = [_shown(each.values, body.encoding_format) for each in found.vectors]
        answer = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(vectors)
            ],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        headers = {REQUEST_ID: request_id, ADAPTER_HEADER: adapter_header(found.adapters)}
        return reply(answer, {name: value for name, value in headers.items() if value})

    return [Route("/v1/embeddings", embed, methods=["POST"])]


def _params(given: Any) -> Mapping[str, str]:
    """Fields of the server's request, and those of the HTTP request that set them."""
    found = {"adapter_id": "model"}
    is_one = isinstance(given, str) or not isinstance(given[0], str | list)
    for i in range(1 if is_one else len(given)):
        place = "input" if is_one else f"input[{i}]"
        for rest in (".token_ids.ids", ".token_ids", ".text", ""):
            found[f"inputs[{i}]{rest}"] = place
    return {**found, "inputs": "input"}


def _shown(values: Sequence[float], encoding: str) -> Any:
    """A vector as numbers, or its bytes as 32-bit floats, lowest byte first, in Base64."""
    if encoding == "float":
        return list(values)
    data = array("f", values)
    if sys.byteorder == "big":
        data.byteswap()
    return base64.b64encode(data.tobytes()).decode()
