"""Requests about tokens."""

from __future__ import annotations

from typing import Any

import msgspec

from loraplex_gateway.wire.bodies import invalid


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


def checked_tokens(request: DetokenizeRequest) -> list[int]:
    """The tokens. Raises ApiError (400)."""
    for i, token in enumerate(request.tokens):
        if not 0 <= token < 1 << 32:
            raise invalid(f"tokens[{i}]", "is not the id of a token")
    return request.tokens
