"""A request for a response, and the chat that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from loraplex_gateway.chat.request import CHAT_PARAMS, REASONING, ChatRequest
from loraplex_gateway.errors import ApiError
from loraplex_gateway.generation.parameters import LoraplexFields
from loraplex_gateway.generation.structure import JsonSchema, ResponseFormat
from loraplex_gateway.responses.items import messages_of
from loraplex_gateway.wire.bodies import NEUTRAL, invalid

_RENAMED: Final = (
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
)
"""Fields of chats, and those of responses that set them."""

PARAMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{ours: dict(_RENAMED).get(theirs, theirs) for ours, theirs in CHAT_PARAMS.items()},
        "messages": "input",
    }
)
"""Fields of the server's request, and those of the HTTP request that set them."""

RESPONSES_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {**NEUTRAL, "background": (False,), "truncation": ("disabled",), "top_logprobs": (0,)}
)
"""Values with which fields that are not supported change no answer."""

_STORED: Final = ("previous_response_id", "conversation", "prompt")
_INCLUDED: Final = frozenset({"reasoning.encrypted_content"})
_LATER: Final = "is not supported: nothing is kept here between calls; send all items as `input`"


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer. The type `json_schema` has its schema here, unlike in chats."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The field `text`. Of the lengths of answers there is the usual one."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream holds beside the answer."""

    include_obfuscation: bool | None = None  # padding against the guessing of lengths; never sent


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How much the model is to think. Summaries are not made, so asking for one has no effect."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseRequest(msgspec.Struct, kw_only=True):
    """The body of `/v1/responses`."""

    model: str
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    # Fields of chats beyond those of OpenAI.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    loraplex: LoraplexFields | None = None


_SAME: Final = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "priority",
    "request_id",
    "cache_salt",
    "chat_template_kwargs",
    "loraplex",
    "tool_choice",
    "parallel_tool_calls",
)
"""Fields that chats have, too."""


def chat_of(request: ResponseRequest) -> ChatRequest:
    """The chat that a request is. Raises ApiError (400)."""
    for name in _STORED:
        if getattr(request, name) is not None:
            raise ApiError(400, f"{name}: {_LATER}", param=name, code="unsupported_parameter")
    if unknown := sorted(set(request.include or ()) - _INCLUDED):
        raise invalid("include", f"{unknown[0][:64]!r} is not supported")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "is only allowed when stream is true")
    return ChatRequest(
        messages=messages_of(request.input, request.instructions),
        tools=None if request.tools is None else [_nested(tool) for tool in request.tools],
        max_completion_tokens=request.max_output_tokens,
        response_format=_format(request.text),
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        stream=request.stream,
        **{name: getattr(request, name) for name in _SAME},
    )


def _nested(tool: Any) -> Any:
    """A tool as chats have it: with the function in an object of its own."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or "function" in tool:
        return tool
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def _format(text: TextOptions | None) -> ResponseFormat | None:
    given = text.format if text is not None else None
    if given is None:
        return None
    if given.type == "json_schema" and given.schema is None:
        raise invalid("text.format.schema", "is missing")
    schema = None if given.schema is None else JsonSchema(schema=given.schema, name=given.name)
    return ResponseFormat(type=given.type, json_schema=schema)


def params_of(request: ResponseRequest) -> Mapping[str, str]:
    """Fields of the server's request, and those of this request that set them."""
    if "reasoning_effort" in (request.chat_template_kwargs or {}):
        return PARAMS
    return {REASONING: "reasoning.effort", **PARAMS}


@contextmanager
def named_as_sent() -> Iterator[None]:
    """Names the fields of errors about the chat as the request for a response has them."""
    try:
        yield
    except ApiError as error:
        param = error.param or ""
        for theirs, ours in _RENAMED:
            if param.startswith(theirs):
                param = ours + param.removeprefix(theirs)
                break
        if param.startswith("tools["):
            param = param.replace(".function", "", 1)
        if error.param and param != error.param:
            error.message = error.message.replace(error.param, param, 1)
            error.param = param
        raise
