"""A response as it grows: its items, and the events that tell of each step."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex import FinishReason, Usage

from loraplex_gateway.errors import ApiError
from loraplex_gateway.generation.answers import Head
from loraplex_gateway.responses.request import ResponseRequest
from loraplex_gateway.tools import CallDelta, TextDelta, ToolDelta

Event = dict[str, Any]

_FAILURES: Final = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


@dataclass(slots=True)
class MessageItem:
    """Text of the answer."""

    status: str = "in_progress"
    text: str = ""
    id: str = field(default_factory=lambda: f"msg_{uuid.uuid4().hex}")

    def shown(self) -> dict[str, Any]:
        """The item as a response has it. It has its text once it has ended."""
        content = [] if self.status == "in_progress" else [_text_part(self.text)]
        return {
            "type": "message",
            "id": self.id,
            "status": self.status,
            "role": "assistant",
            "content": content,
        }


@dataclass(slots=True)
class CallItem:
    """A call of a function."""

    call_id: str
    name: str
    status: str = "in_progress"
    arguments: str = ""
    id: str = field(default_factory=lambda: f"fc_{uuid.uuid4().hex}")

    def shown(self) -> dict[str, Any]:
        """The item as a response has it."""
        return {
            "type": "function_call",
            "id": self.id,
            "status": self.status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class ResponseOutput:
    """Makes a response and its events of what a reader finds in a completion's text."""

    def __init__(self, request: ResponseRequest, head: Head) -> None:
        self._request = request
        self._head = head
        self._items: list[MessageItem | CallItem] = []
        self._open = False
        self._number = -1

    def begin(self) -> Iterator[Event]:
        """The first events."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self.response("in_progress"))

    def add(self, delta: ToolDelta) -> Iterator[Event]:
        """The events of a part of the answer."""
        if isinstance(delta, TextDelta):
            item = self._items[-1] if self._open else None
            if not isinstance(item, MessageItem):
                yield from self._close("completed")
                yield from self._open_item(MessageItem())
            yield from self._text(delta.text)
            return
        if delta.name:
            yield from self._close("completed")
            yield from self._open_item(CallItem(delta.id, delta.name))
        yield from self._arguments(delta)

    def end(
        self, reason: FinishReason, usage: Usage, call_is_open: bool = False
    ) -> Iterator[Event]:
        """The last events, the response itself in the very last.

        `call_is_open` if a stop string has cut off the arguments of the last call.
        """
        is_cut = reason is FinishReason.LENGTH
        if not self._items:
            yield from self._open_item(MessageItem())
        yield from self._close("incomplete" if is_cut or call_is_open else "completed")
        status = "incomplete" if is_cut else "completed"
        yield self._event(f"response.{status}", response=self.response(status, usage))

    def fail(self, error: ApiError) -> Event:
        """The last event of a response that an error has ended."""
        response = self.response("failed")
        code = _FAILURES.get(error.status, "server_error")
        response["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=response)

    def response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        """The response as it is now."""
        is_cut = status == "incomplete"
        return {
            "id": f"resp_{self._head.request_id}",
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._head.model,
            "output": [item.shown() for item in self._items],
            "usage": None if usage is None else _usage(usage),
            **_echoed(self._request),
        }

    def _open_item(self, item: MessageItem | CallItem) -> Iterator[Event]:
        self._items.append(item)
        self._open = True
        yield self._at("response.output_item.added", item=item.shown())
        if isinstance(item, MessageItem):
            yield self._within("response.content_part.added", part=_text_part(""))

    def _text(self, text: str) -> Iterator[Event]:
        item = self._items[-1]
        assert isinstance(item, MessageItem), "text follows the event of its item"
        item.text += text
        yield self._within("response.output_text.delta", delta=text, logprobs=[])

    def _arguments(self, delta: CallDelta) -> Iterator[Event]:
        item = self._items[-1]
        assert isinstance(item, CallItem), "arguments follow the event of their item"
        item.arguments += delta.arguments
        if delta.arguments:
            yield self._of("response.function_call_arguments.delta", item.id, delta=delta.arguments)

    def _close(self, status: str) -> Iterator[Event]:
        """The events that end the last item, if it has not ended."""
        if not self._open:
            return
        self._open = False
        item = self._items[-1]
        item.status = status
        if isinstance(item, MessageItem):
            yield self._within("response.output_text.done", text=item.text, logprobs=[])
            yield self._within("response.content_part.done", part=_text_part(item.text))
        else:
            yield self._of(
                "response.function_call_arguments.done",
                item.id,
                name=item.name,
                arguments=item.arguments,
            )
        yield self._at("response.output_item.done", item=item.shown())

    def _within(self, kind: str, **fields: Any) -> Event:
        """An event about the content of the last item."""
        return self._of(kind, self._items[-1].id, content_index=0, **fields)

    def _of(self, kind: str, item_id: str, **fields: Any) -> Event:
        return self._at(kind, item_id=item_id, **fields)

    def _at(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_prompt_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _echoed(request: ResponseRequest) -> dict[str, Any]:
    """What a response says of its request."""
    reasoning = request.reasoning
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": None,
        },
        "background": False,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": _format(request)},
        "tool_choice": request.tool_choice or "auto",
        "tools": [_tool(tool) for tool in request.tools or ()],
        "top_logprobs": 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "truncation": "disabled",
    }


def _format(request: ResponseRequest) -> dict[str, Any]:
    given = request.text.format if request.text is not None else None
    if given is None or given.type != "json_schema":
        return {"type": "text" if given is None else given.type}
    return {
        "type": "json_schema",
        "name": given.name or "",
        "description": given.description,
        "schema": given.schema,
        "strict": bool(given.strict),
    }


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    return {
        "type": "function",
        "name": function.get("name"),
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": bool(function.get("strict")),
    }
