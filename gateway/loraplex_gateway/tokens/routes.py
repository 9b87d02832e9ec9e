"""The routes of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loraplex import AsyncClient, LoraplexError, ModelDescription
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.chat import tooling
from loraplex_gateway.chat.request import CHAT_PARAMS, ChatRequest, conversation_options
from loraplex_gateway.context import Context, bearer
from loraplex_gateway.generation.rendering import rendering
from loraplex_gateway.tokens.request import DetokenizeRequest, TokenizeRequest, checked_tokens
from loraplex_gateway.wire.bodies import invalid, read
from loraplex_gateway.wire.replies import reply

_HARMLESS: Final = frozenset({"user"})
_PARAMS: Final = {"token_ids.ids": "tokens", "token_ids": "tokens"}
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"mm_processor_kwargs": ({},)})


def routes(context: Context) -> list[BaseRoute]:
    """The routes of tokens."""

    async def tokenize(request: Request) -> Response:
        client = context.client_for(request)
        limit = context.settings.max_body_bytes
        body = await read(request, TokenizeRequest, limit, _HARMLESS, _NEUTRAL)
        base = await context.ids.base(client)
        model = body.model or base.name
        adapter = await context.ids.adapter(client, model, bearer(request))
        if body.prompt is not None and adapter:
            await context.ids.require(client, model, adapter)
        return reply(await _tokenized(client, body, model, adapter, context, base))

    async def detokenize(request: Request) -> Response:
        client = context.client_for(request)
        limit = context.settings.max_body_bytes
        body = await read(request, DetokenizeRequest, limit, _HARMLESS, _NEUTRAL)
        if body.model:
            adapter = await context.ids.adapter(client, body.model, bearer(request))
            await context.ids.require(client, body.model, adapter)
        tokens = checked_tokens(body)
        skip = bool(body.skip_special_tokens)
        try:
            found = await client.detokenize(tokens, skip_special_tokens=skip)
        except LoraplexError as error:
            raise errors.of(error, _PARAMS) from None
        return reply({"prompt": found.text})

    async def info(request: Request) -> Response:
        return reply(await _info(context.client_for(request)))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", info, methods=["GET"]),
    ]


async def _tokenized(
    client: AsyncClient,
    body: TokenizeRequest,
    model: str,
    adapter: str,
    context: Context,
    base: ModelDescription,
) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "must be given, or messages, but not both")
    if body.messages is not None:
        if body.add_special_tokens:
            raise invalid("add_special_tokens", "has no meaning with messages; the template adds")
        chat = _chat(body, model)
        options = conversation_options(chat)
        _, plan = tooling.with_tools({}, chat, base, context.settings)
        if plan is not None:
            options["tools"] = plan.rendered
        rendered = await rendering(client, model, adapter or None, options, CHAT_PARAMS)
        tokens = list(rendered.token_ids)
    else:
        special = body.add_special_tokens is not False
        tokenized = await client.tokenize(body.prompt or "", special_tokens=special)
        tokens = list(tokenized.token_ids)
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": base.max_context,
        "tokens": tokens,
    }
    if body.return_token_strs:
        found["token_strs"] = await _pieces(client, tokens)
    return found


async def _info(client: AsyncClient) -> dict[str, Any]:
    """What clients need to use the chat template themselves.

    Not from memory, so that only callers that the server knows are answered.
    """
    base = await client.get_model()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": base.bos_token.text if base.bos_token else None,
        "eos_token": base.eos_tokens[0].text if base.eos_tokens else None,
        "pad_token": None,
        "model_max_length": base.max_context,
        "vocab_size": base.vocab_size,
        "chat_template": (base.chat_template.text if base.chat_template else None) or None,
    }


def _chat(body: TokenizeRequest, model: str) -> ChatRequest:
    """The same conversation as a request for an answer has it."""
    return ChatRequest(
        model=model,
        messages=body.messages or [],
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )


async def _pieces(client: AsyncClient, tokens: list[int]) -> list[str]:
    """The text of each token."""
    found = await client.detokenize(tokens, pieces=True)
    return [piece.decode("utf-8", "replace") for piece in found.pieces]
