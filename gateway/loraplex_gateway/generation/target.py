"""Who answers: the base, an adapter, or a mix of adapters."""

from __future__ import annotations

from typing import Any

from loraplex import AsyncClient
from starlette.requests import Request

from loraplex_gateway.context import Context, bearer
from loraplex_gateway.generation.answers import Head, fingerprint_of, request_id_of
from loraplex_gateway.generation.parameters import SamplingFields
from loraplex_gateway.wire.bodies import invalid


async def target(
    context: Context, client: AsyncClient, request: Request, fields: SamplingFields
) -> dict[str, Any]:
    """The client's options for the model that a request names. Raises ApiError (400, 404)."""
    key = bearer(request)
    adapter = await context.ids.adapter(client, fields.model, key)
    mix = fields.loraplex.mix if fields.loraplex is not None else None
    if not mix:
        return {"adapter": adapter} if adapter else {}
    if adapter:
        raise invalid("loraplex.mix", "is only allowed with the base as model")
    found: dict[str, float | None] = {}
    for i, term in enumerate(mix):
        name = await context.ids.adapter(client, term.adapter, key)
        if not name:
            raise invalid(f"loraplex.mix[{i}].adapter", "is the base, which every mix contains")
        if name in found:
            raise invalid(f"loraplex.mix[{i}].adapter", "is in the mix twice")
        found[name] = term.weight
    return {"mix": found}


async def head_of(
    context: Context, client: AsyncClient, request: Request, fields: SamplingFields
) -> Head:
    """What all parts of the answer have in common."""
    base = await context.ids.base(client)
    request_id = request_id_of(request, fields.request_id)
    return Head(request_id, fields.model, fingerprint_of(base.fingerprint))
