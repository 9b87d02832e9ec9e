"""The routes of chats."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.chat import tooling
from loraplex_gateway.chat.answer import answer
from loraplex_gateway.chat.request import (
    CHAT_NEUTRAL,
    ChatRequest,
    chat_options,
    conversation_options,
)
from loraplex_gateway.chat.stream import ChatStream
from loraplex_gateway.context import Context
from loraplex_gateway.generation.answers import merged
from loraplex_gateway.generation.rendering import rendering
from loraplex_gateway.generation.samples import Call
from loraplex_gateway.generation.target import head_of, target
from loraplex_gateway.places import ClientsInTurn
from loraplex_gateway.wire.bodies import read
from loraplex_gateway.wire.events import EventStream, unless_gone
from loraplex_gateway.wire.replies import reply


def routes(context: Context) -> list[BaseRoute]:
    """The routes of chats."""

    async def complete(request: Request) -> Response:
        client = context.client_for(request)
        body = await _body(context, request)
        base = await context.ids.base(client)
        options = chat_options(body, base.max_context)
        options, plan = tooling.with_tools(options, body, base, context.settings)
        who = await target(context, client, request, body)
        head = await head_of(context, client, request, body)
        options = merged(options, {**who, "request_id": head.request_id})
        names = tooling.params(plan, body.params)
        call = Call(ClientsInTurn([client]), body.model, names, **options)
        if body.stream:
            stream = ChatStream(body, plan, head)
            return EventStream(stream.events(call), stream.headers)
        completion = await unless_gone(request, call.completion())
        found = answer(body, plan, head, completion)
        return reply(found, head.headers(completion.adapters))

    async def render(request: Request) -> Response:
        """The prompt that a conversation becomes, without an answer."""
        client = context.client_for(request)
        body = await _body(context, request)
        options = conversation_options(body)
        base = await context.ids.base(client)
        _, plan = tooling.with_tools({}, body, base, context.settings)
        if plan is not None:
            options["tools"] = plan.rendered
        who = await target(context, client, request, body)
        rendered = await rendering(client, body.model, who.get("adapter"), options, body.params)
        ids = list(rendered.token_ids)
        return reply({"prompt": rendered.text, "token_ids": ids, "count": len(ids)})

    return [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions/render", render, methods=["POST"]),
    ]


async def _body(context: Context, request: Request) -> ChatRequest:
    limit = context.settings.max_body_bytes
    return await read(request, ChatRequest, limit, neutral=CHAT_NEUTRAL)
