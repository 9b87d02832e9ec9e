"""The route of text completions."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from loraplex import Completion, Started
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway.completions.parts import Echoed, Parts, echoed
from loraplex_gateway.completions.request import (
    CompletionRequest,
    Prompt,
    completion_options,
    params_of,
    prompts_of,
)
from loraplex_gateway.completions.stream import CompletionStream
from loraplex_gateway.context import Context
from loraplex_gateway.generation import structure
from loraplex_gateway.generation.answers import Head, merged, usage
from loraplex_gateway.generation.samples import Call, samples_of
from loraplex_gateway.generation.target import head_of, target
from loraplex_gateway.places import ClientsInTurn
from loraplex_gateway.tokens.texts import VocabularyTexts
from loraplex_gateway.wire.bodies import read
from loraplex_gateway.wire.events import EventStream, unless_gone
from loraplex_gateway.wire.merging import all_of
from loraplex_gateway.wire.replies import reply

AT_ONCE: Final = 64
"""Most prompts of one request that are at the server at a time."""


def routes(context: Context) -> list[BaseRoute]:
    """The route of text completions."""
    texts = VocabularyTexts()

    async def complete(request: Request) -> Response:
        client = context.client_for(request)
        body = await read(request, CompletionRequest, context.settings.max_body_bytes)
        prompts = prompts_of(body)
        options = completion_options(body)
        who = await target(context, client, request, body)
        head = await head_of(context, client, request, body)
        base = await context.ids.base(client)
        if body.add_special_tokens is False:
            prompts = [await texts.plain_tokens(client, each) for each in prompts]
        more = context.more_clients(request, min(len(prompts), AT_ONCE) - 1)
        clients = ClientsInTurn([client, *more])
        calls = _calls(clients, body, head, prompts, merged(options, who))

        async def echo_of(index: int, answer: Completion | Started) -> Echoed:
            return await echoed(client, texts, base, body, prompts[index], answer)

        if body.stream:
            stream = CompletionStream(body, head, calls, clients.count)
            return EventStream(stream.events(echo_of), stream.headers)
        completions = await unless_gone(request, _all(calls))
        echoes = [await echo_of(i, each) for i, each in enumerate(completions)]
        found = _answer(body, head, completions, echoes)
        return reply(found, head.headers(completions[0].adapters))

    return [Route("/v1/completions", complete, methods=["POST"])]


def _calls(
    clients: ClientsInTurn,
    body: CompletionRequest,
    head: Head,
    prompts: list[Prompt],
    options: dict[str, Any],
) -> list[Call]:
    """One call for each prompt; only with several have they ids that differ."""
    calls = []
    for i, prompt in enumerate(prompts):
        names = {**params_of(body, i), **structure.params(body)}
        name = head.request_id if len(prompts) == 1 else f"{head.request_id[:120]}-{i}"
        given: dict[str, Any] = {**options, "request_id": name}
        if isinstance(prompt, str):
            given["prompt"] = prompt
        else:
            given["token_ids"] = prompt
        calls.append(Call(clients, body.model, names, **given))
    return calls


async def _all(calls: list[Call]) -> list[Completion]:
    if len(calls) == 1:
        return [await calls[0].completion()]
    return await all_of([asyncio.ensure_future(call.completion()) for call in calls])


def _answer(
    body: CompletionRequest, head: Head, completions: list[Completion], echoes: list[Echoed]
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    generated = 0
    for completion, echo in zip(completions, echoes, strict=True):
        for sample in samples_of(completion):
            part = Parts(body, len(choices))
            choices.append(part.whole(echo, completion, sample))
            generated += sample.usage.completion_tokens
    return {
        **head.body("text_completion", "cmpl"),
        "choices": choices,
        "usage": usage(
            sum(each.usage.prompt_tokens for each in completions),
            generated,
            sum(each.usage.cached_prompt_tokens for each in completions),
        ),
    }
