"""Prompts without answers: what a conversation is rendered to, and what a text's tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex import AsyncClient, LoraplexError, RenderedChat

from loraplex_gateway import errors


async def rendering(
    client: AsyncClient,
    model: str,
    adapter: str | None,
    options: Mapping[str, Any],
    params: Mapping[str, str],
) -> RenderedChat:
    """The prompt that a conversation becomes. Raises ApiError."""
    try:
        return await client.render_chat(adapter=adapter, **options)
    except LoraplexError as error:
        if error.reason == "ADAPTER_NOT_FOUND":
            raise errors.not_found(model, error.request_id) from None
        raise errors.of(error, params) from None
