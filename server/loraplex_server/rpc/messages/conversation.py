"""Conversations of requests as the chat template gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Problem
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate

from loraplex_server.rpc.calls.bounds import MAX_SHOWN
from loraplex_server.rpc.calls.errors import require
from loraplex_server.rpc.messages.validate import RequestChecks
from loraplex_server.runtime.lanes import Lane

INLINE_BYTES: Final = 64 << 10
"""Largest conversation that is read on the event loop, where a thread would cost more."""

MAX_JSON_DEPTH: Final = 32
"""Most lists and objects within each other in a JSON value."""


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation, and how it is rendered."""

    messages: list[dict[str, Any]]
    options: ChatOptions


async def read_chat(wire: generation_pb2.ChatMessages, field: str, lane: Lane) -> ChatInput:
    """Reads a conversation that `validate` has passed, a large one in a thread of `lane`.

    `field` is its path in the request. Raises Refusal that names each text that is not JSON.
    """
    if wire.ByteSize() > INLINE_BYTES:
        return await lane.run(_read, wire, field)
    return _read(wire, field)


def unread(options: ChatOptions, template: ChatTemplate, field: str) -> list[Problem]:
    """Problems of the options that a template does not read, and so would ignore."""
    checks = RequestChecks(field)
    if options.tools and not template.takes_tools:
        checks.add(".tools", "the chat template does not read tools")
    known = ", ".join(template.variables) or "none"
    for name in options.variables:
        if name not in template.variables:
            text = f"is not a variable that the chat template reads; it reads: {known}"
            checks.add(f".chat_template_kwargs[{name[:MAX_SHOWN]}]", text)
    return checks.problems


def _read(wire: generation_pb2.ChatMessages, field: str) -> ChatInput:
    checks = RequestChecks(field)
    messages = [
        _message(message, f".messages[{i}]", checks) for i, message in enumerate(wire.messages)
    ]
    tools = [_object(text, f".tools[{i}]", checks) for i, text in enumerate(wire.tools)]
    variables = {
        name: _variable(value, f".chat_template_kwargs[{name[:MAX_SHOWN]}]", checks)
        for name, value in wire.chat_template_kwargs.items()
    }
    require(checks.problems)
    given = {name: getattr(wire, name) for name in _FLAGS if wire.HasField(name)}
    return ChatInput(messages, ChatOptions(tools=tools, variables=variables, **given))


_FLAGS: Final = ("add_generation_prompt", "continue_final_message")


def _message(wire: generation_pb2.ChatMessage, field: str, checks: RequestChecks) -> dict[str, Any]:
    # Clients of older versions leave out an empty content.
    content: Any = wire.content if wire.HasField("content") or not wire.tool_calls else None
    if wire.parts:
        content = [{"type": "text", "text": part.text} for part in wire.parts]
    message: dict[str, Any] = {"role": wire.role, "content": content}
    if wire.HasField("reasoning_content"):
        message["reasoning_content"] = wire.reasoning_content
    message |= {key: getattr(wire, key) for key in ("name", "tool_call_id") if getattr(wire, key)}
    if wire.tool_calls:
        message["tool_calls"] = [
            _call(call, f"{field}.tool_calls[{i}]", checks)
            for i, call in enumerate(wire.tool_calls)
        ]
    return message


def _call(wire: generation_pb2.ToolCall, field: str, checks: RequestChecks) -> dict[str, Any]:
    arguments = _object(wire.arguments, field + ".arguments", checks) if wire.arguments else {}
    call = {"type": "function", "function": {"name": wire.name, "arguments": arguments}}
    return {"id": wire.id, **call} if wire.id else call


def _variable(value: generation_pb2.TemplateValue, field: str, checks: RequestChecks) -> Any:
    kind = value.WhichOneof("kind") or ""
    if kind == "json_value":
        return _json(value.json_value, field + "." + kind, checks)
    return getattr(value, kind)


def _object(text: str, field: str, checks: RequestChecks) -> Mapping[str, Any]:
    value = _json(text, field, checks)
    if isinstance(value, dict):
        return value
    if value is not _UNREADABLE:
        checks.add(field, "must be the text of a JSON object")
    return {}


_UNREADABLE: Final = object()


def _json(text: str, field: str, checks: RequestChecks) -> Any:
    """The value of a JSON text; adds a problem and returns `_UNREADABLE` if it is none."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        checks.add(field, f"must be JSON: {error}")
        return _UNREADABLE
    except RecursionError:
        value, depth = _UNREADABLE, MAX_JSON_DEPTH + 1
    else:
        depth = _depth(value)
    if depth > MAX_JSON_DEPTH:
        checks.add(field, f"must have at most {MAX_JSON_DEPTH} lists and objects within each other")
        return _UNREADABLE
    return value


def _depth(value: Any) -> int:
    """Number of lists and objects within each other, counted up to one beyond the bound."""
    depth, level = 0, [value]
    while depth <= MAX_JSON_DEPTH:
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return depth
        depth += 1
        level = [e for each in level for e in (each.values() if isinstance(each, dict) else each)]
    return depth
