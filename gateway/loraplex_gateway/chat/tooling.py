"""Where tools come in: what they add to a request, and what becomes of the answer's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from loraplex_gateway.chat.request import ChatRequest
from loraplex_gateway.wire.bodies import unsupported


class AnswerReader(Protocol):
    """Reads the text of one answer as it comes."""

    def feed(self, text: str) -> Iterable[Any]:
        """The parts that have become certain with more text."""

    def end(self) -> Iterable[Any]:
        """The parts that were held back until the end."""


class AnswerPlan(Protocol):
    """What a request with tools needs.

    Attributes:
        options: options of the client in addition to the request's.
    """

    @property
    def options(self) -> Mapping[str, Any]: ...


class PlainReader:
    """Takes the whole text for the answer's."""

    def feed(self, text: str) -> Iterable[str]:
        return (text,) if text else ()

    def end(self) -> Iterable[str]:
        return ()


def plan(request: ChatRequest) -> AnswerPlan | None:
    """What the tools of a request need; None if it has none. Raises ApiError (400)."""
    if request.tools and request.tool_choice != "none":
        raise unsupported("tools")
    return None


def reader(plan: AnswerPlan | None) -> AnswerReader:
    """A reader for one answer."""
    return PlainReader()


def chat_delta(delta: Any) -> dict[str, Any]:
    """The `delta` of a chunk for a part that a reader has returned."""
    return {"content": delta}


def chat_message(deltas: Iterable[Any]) -> dict[str, Any]:
    """`content`, and `tool_calls` if there are any, of all the parts of an answer."""
    return {"content": "".join(deltas)}
