"""Where tools come in: what they add to a request, and what becomes of the answer's text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex import FinishReason, ModelDescription

from loraplex_gateway import tools
from loraplex_gateway.chat.request import ChatRequest
from loraplex_gateway.generation.answers import finish_reason
from loraplex_gateway.settings import GatewaySettings
from loraplex_gateway.tools import ToolPlan, chat_delta, chat_message, reader

__all__ = ["ToolPlan", "chat_delta", "chat_message", "ended", "params", "reader", "with_tools"]


def with_tools(
    options: Mapping[str, Any],
    request: ChatRequest,
    base: ModelDescription,
    settings: GatewaySettings,
) -> tuple[dict[str, Any], ToolPlan | None]:
    """The client's options with what the request's tools add to them, and how those are treated.

    Raises ApiError (400).
    """
    return tools.with_tools(
        options,
        base,
        request.tools,
        request.tool_choice,
        request.parallel_tool_calls,
        settings.tool_format,
    )


def params(plan: ToolPlan | None, known: Mapping[str, str]) -> Mapping[str, str]:
    """Fields of the server's request, and those of the HTTP request that set them."""
    if plan is None or not plan.grammar:
        return known
    return {**known, "structured_output.grammar": "tools", "structured_output": "tools"}


def ended(reason: FinishReason, called: bool, is_open: bool = False) -> str:
    """OpenAI's word for why an answer ended.

    It is that of answers without calls if the last call was cut off (`is_open`), by the length of
    the answer or by a stop string, so that nobody takes its arguments for whole.
    """
    is_whole = called and not is_open and reason is FinishReason.STOP
    return "tool_calls" if is_whole else finish_reason(reason)
