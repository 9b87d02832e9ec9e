"""What a reader makes of a completion's text: text to show, and calls of functions."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

_LETTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that belongs to the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a call of a function.

    Attributes:
        index: which call of the answer this is a part of, from 0.
        arguments: more of the JSON text of the arguments.
        id: id of the call, only in its first part; "" in the others.
        name: name of the function, only in the call's first part; "" in the others.
    """

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


ToolDelta = TextDelta | CallDelta


def chat_delta(delta: ToolDelta) -> dict[str, Any]:
    """The `delta` of a chunk of a chat completion."""
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.index}
    if delta.name:
        call |= {"id": delta.id, "type": "function"}
    function = {"name": delta.name} if delta.name else {}
    return {"tool_calls": [{**call, "function": {**function, "arguments": delta.arguments}}]}


def chat_message(deltas: Iterable[ToolDelta]) -> dict[str, Any]:
    """`content`, and `tool_calls` if there are any, of the message that the parts make together.

    The content is None if the message has calls and no text.
    """
    text, calls = joined(deltas)
    if not calls:
        return {"content": text}
    return {
        "content": text or None,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ],
    }


def joined(deltas: Iterable[ToolDelta]) -> tuple[str, list[CallDelta]]:
    """All text, and one whole part for each call."""
    text, calls = "", dict[int, CallDelta]()
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text += delta.text
        elif delta.index in calls:
            old = calls[delta.index]
            calls[delta.index] = CallDelta(
                old.index, old.arguments + delta.arguments, old.id, old.name
            )
        else:
            calls[delta.index] = delta
    return text, list(calls.values())


def long_id() -> str:
    """A new id of a call, as OpenAI makes them."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """A new id of 9 letters and digits, as the chat templates of Mistral require."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
