"""Calls of functions: what a request's tools mean for the model, and finding calls in its text.

`plan` reads a request and says what the server is asked for; `reader` takes the completion's text
apart. Nothing here knows of HTTP or sends anything.
"""

from loraplex_gateway.tools.deltas import (
    CallDelta,
    TextDelta,
    ToolDelta,
    chat_delta,
    chat_message,
    joined,
)
from loraplex_gateway.tools.plan import ToolPlan, plan, reader, with_tools
from loraplex_gateway.tools.reader import ToolReader

__all__ = [
    "CallDelta",
    "TextDelta",
    "ToolDelta",
    "ToolPlan",
    "ToolReader",
    "chat_delta",
    "chat_message",
    "joined",
    "plan",
    "reader",
    "with_tools",
]
