"""Messages of conversations as clients send them, made into what the client of the server takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loraplex_gateway.wire.bodies import invalid

_IGNORED: Final = frozenset({"annotations", "refusal", "audio", "id", "status"})
"""Keys of answers that clients send back with them, and which no chat template reads."""

_NAMES: Final = frozenset({"name", "tool_call_id"})

_TEXTS: Final = frozenset({"text", "input_text", "output_text"})
"""Types of parts that hold a text."""


def checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without what no template reads. Raises ApiError (400) with the place at fault.

    The client and the server check the rest.
    """
    if not messages:
        raise invalid("messages", "must not be empty")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {
        key: value for key, value in message.items() if value is not None and key not in _IGNORED
    }
    role = found.get("role")
    if not isinstance(role, str):
        raise invalid(f"{where}.role", "is missing" if role is None else "is not a text")
    for key in _NAMES & found.keys():
        if not isinstance(found[key], str):
            raise invalid(f"{where}.{key}", "is not a text")
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
        if not content and found.get("tool_calls"):
            del found["content"]
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{where}.content", "is neither a text nor a list of parts")
    if found.get("tool_calls") == []:
        del found["tool_calls"]
    if role == "assistant" and content is None and "tool_calls" not in found:
        found["content"] = ""
    return found


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part as text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise invalid(where, "is not an object")
    kind = part.get("type", "text")
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind not in _TEXTS:
        shown = str(kind)[:64]
        raise invalid(f"{where}.type", f"{shown!r} is not supported; this model reads text only")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{where}.text", "is not a text")
    return {"type": "text", "text": part["text"]}
