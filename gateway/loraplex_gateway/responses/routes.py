"""The routes of responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import Any

from loraplex import AsyncStream, Completion, Finished, LoraplexError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from loraplex_gateway import errors
from loraplex_gateway.chat import tooling
from loraplex_gateway.chat.request import chat_options
from loraplex_gateway.context import Context
from loraplex_gateway.errors import ApiError
from loraplex_gateway.generation.answers import Head, merged
from loraplex_gateway.generation.samples import Call
from loraplex_gateway.generation.target import head_of, target
from loraplex_gateway.places import ClientsInTurn
from loraplex_gateway.responses.output import ResponseOutput
from loraplex_gateway.responses.request import (
    RESPONSES_NEUTRAL,
    ResponseRequest,
    chat_of,
    named_as_sent,
    params_of,
)
from loraplex_gateway.tools import ToolPlan
from loraplex_gateway.wire.bodies import HARMLESS, read
from loraplex_gateway.wire.events import EventStream, event, unless_gone
from loraplex_gateway.wire.replies import reply


def routes(context: Context) -> list[BaseRoute]:
    """The routes of responses."""

    async def create(request: Request) -> Response:
        client = context.client_for(request)
        limit = context.settings.max_body_bytes
        body = await read(
            request, ResponseRequest, limit, HARMLESS - {"metadata"}, RESPONSES_NEUTRAL
        )
        base = await context.ids.base(client)
        with named_as_sent():
            chat = chat_of(body)
            options = chat_options(chat, base.max_context)
            options, plan = tooling.with_tools(options, chat, base, context.settings)
        who = await target(context, client, request, chat)
        head = await head_of(context, client, request, chat)
        options = merged(options, {**who, "request_id": head.request_id})
        names = tooling.params(plan, params_of(body))
        call = Call(ClientsInTurn([client]), body.model, names, **options)
        if body.stream:
            stream = ResponseStream(body, plan, head)
            return EventStream(stream.events(call), stream.headers, last=b"")
        completion = await unless_gone(request, call.completion())
        return reply(_whole(body, plan, head, completion), head.headers(completion.adapters))

    async def stored(request: Request) -> Response:
        """Of a response that was given before: it is not kept."""
        shown = request.path_params["response"][:64]
        raise ApiError(
            404,
            f"there is no response {shown!r}: responses are not stored",
            param="response_id",
            code="response_not_found",
        )

    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route(
            "/v1/responses/{response}", stored, methods=["GET", "DELETE"], include_in_schema=False
        ),
    ]


def _whole(
    request: ResponseRequest, plan: ToolPlan | None, head: Head, completion: Completion
) -> dict[str, Any]:
    """The response to a request without a stream."""
    output, reader = ResponseOutput(request, head), tooling.reader(plan)
    for delta in (*reader.feed(completion.text), *reader.end()):
        for _ in output.add(delta):
            pass
    *_, last = output.end(completion.finish_reason, completion.usage, reader.is_open)
    response: dict[str, Any] = last["response"]
    return response


class ResponseStream:
    """The events of one response."""

    def __init__(self, request: ResponseRequest, plan: ToolPlan | None, head: Head) -> None:
        self._head = head
        self._output = ResponseOutput(request, head)
        self._reader = tooling.reader(plan)
        self._opened: list[AsyncStream] = []

    def headers(self) -> dict[str, str]:
        """The headers of the response; complete once the first event is there."""
        started = self._opened[0].started if self._opened else None
        return self._head.headers(started.adapters if started is not None else ())

    async def events(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Yields the events. Raises ApiError before the first one; a later one is an event."""
        output, begun = self._output, False
        try:
            async for part in call.stream(self._opened):
                if isinstance(part, Finished):  # the end is told with that of the call
                    continue
                first = b"" if begun else _written(output.begin())
                begun = True
                found = self._reader.feed(part.text)
                if chunk := first + b"".join(_written(output.add(each)) for each in found):
                    yield chunk
            (stream,) = self._opened
            completion = await stream.completion()
        except (ApiError, LoraplexError) as error:
            if not begun:
                raise
            failure = error if isinstance(error, ApiError) else errors.of(error)
            yield _written([output.fail(failure)])
            return
        last = b"" if begun else _written(output.begin())
        last += b"".join(_written(output.add(each)) for each in self._reader.end())
        yield last + _written(
            output.end(completion.finish_reason, completion.usage, self._reader.is_open)
        )


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(event(each, each["type"]) for each in events)
