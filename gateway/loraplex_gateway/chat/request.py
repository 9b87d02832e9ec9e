"""A request for the answer to a conversation, and the client's options for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from loraplex_gateway.chat.messages import checked
from loraplex_gateway.generation import structure
from loraplex_gateway.generation.parameters import PARAMS, SamplingFields, options
from loraplex_gateway.wire.bodies import NEUTRAL, invalid

MAX_TOP_LOGPROBS: Final = 20

CHAT_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {**NEUTRAL, "echo": (False,), "add_special_tokens": (False,)}
)
"""Values with which fields that chats do not support change no answer."""

CHAT_PARAMS: Final[Mapping[str, str]] = MappingProxyType(
    {**PARAMS, "logprobs": "top_logprobs", "input": "messages", "prompt": "messages"}
)
"""Fields of the server's request, and those of the HTTP request that set them."""


REASONING: Final = "messages.chat_template_kwargs[reasoning_effort]"
"""The server's field for `reasoning_effort`."""


class ChatRequest(SamplingFields, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def params(self) -> dict[str, str]:
        """Fields of the server's request, and those of this request that set them."""
        found = {**CHAT_PARAMS, **structure.params(self)}
        if self.reasoning_effort is None or "reasoning_effort" in (self.chat_template_kwargs or {}):
            return found
        return {REASONING: "reasoning_effort", **found}

    @property
    def top(self) -> int:
        """Number of alternatives to show for each token."""
        return self.top_logprobs or 0


def chat_options(request: ChatRequest, max_context: int) -> dict[str, Any]:
    """The client's options, but for the model. Raises ApiError (400).

    Without a number of tokens, the answer may be as long as the context allows.
    """
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise invalid("top_logprobs", "is only allowed when logprobs is true")
        if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
            raise invalid("top_logprobs", f"must be between 0 and {MAX_TOP_LOGPROBS}")
    return {
        **options(request),
        **conversation_options(request),
        "max_new_tokens": _max_tokens(request, max_context),
        "logprobs": request.top if request.logprobs else None,
    }


def conversation_options(request: ChatRequest) -> dict[str, Any]:
    """The client's options that say how the conversation becomes a prompt."""
    continued = bool(request.continue_final_message)
    opened = request.add_generation_prompt
    if continued and opened:
        text = "excludes add_generation_prompt; set that to false"
        raise invalid("continue_final_message", text)
    variables = dict(request.chat_template_kwargs or {})
    # A template that cannot reason does not read it, and `none` asks for just that.
    if request.reasoning_effort not in (None, "none"):
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    return {
        "messages": checked(request.messages),
        "add_generation_prompt": (not continued) if opened is None else opened,
        "continue_final_message": continued,
        "chat_template_kwargs": variables or None,
    }


def _max_tokens(request: ChatRequest, max_context: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        given: int | None = getattr(request, name)
        if given is not None:
            if given < 1:
                raise invalid(name, "must be at least 1")
            return min(given, max_context)
    return max_context
