"""`/v1/engine/watch`: the state of the batch, again and again, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

from loraplex import AsyncClient, EngineState
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire.events import EventStream, event

DEFAULT_SECONDS: Final = 0.25
LEAST_SECONDS: Final = 0.1
MOST_SECONDS: Final = 60.0


def routes(context: Context) -> list[BaseRoute]:
    async def watch(request: Request) -> Response:
        client, interval = context.client_for(request), interval_of(request)
        return EventStream(_states(client, interval), last=b"")

    return [Route("/v1/engine/watch", watch, methods=["GET"])]


def interval_of(request: Request) -> float:
    """Seconds between two states. Raises ApiError (400)."""
    text = request.query_params.get("interval", "")
    try:
        seconds = float(text) if text else DEFAULT_SECONDS
    except ValueError:
        seconds = -1.0
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise ApiError(
            400,
            f"interval: {text[:32]!r} is not a number of seconds from {LEAST_SECONDS:g} to "
            f"{MOST_SECONDS:g}",
            param="interval",
            code="invalid_value",
        )
    return seconds


async def _states(client: AsyncClient, interval: float) -> AsyncGenerator[bytes, None]:
    """The states, each as an event, until the server ends the stream or the client leaves."""
    async with client.watch_engine(interval=interval) as states:
        async for state in states:
            yield event(described(state))


def described(state: EngineState) -> dict[str, Any]:
    """The state as JSON."""
    return {
        "object": "engine.state",
        "time": state.time.timestamp(),
        "steps": state.steps,
        "generated_tokens": state.generated_tokens,
        "prompt_tokens": state.prompt_tokens,
        "adapters": [
            {
                "adapter": rows.adapter_id,
                "hidden": rows.hidden,
                "prefill": rows.prefill,
                "decode": rows.decode,
                "waiting": rows.waiting,
            }
            for rows in state.adapters
        ],
        "kv_blocks_used": state.kv_blocks_used,
        "kv_blocks": state.kv_blocks,
        "kv_blocks_cached": state.kv_blocks_cached,
        "resident_adapters": state.resident_adapters,
        "adapter_bytes": state.adapter_bytes,
        "adapter_bytes_limit": state.adapter_bytes_limit,
        "max_rows": state.max_rows,
    }
