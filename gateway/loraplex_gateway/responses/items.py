"""The input of a response as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loraplex_gateway.wire.bodies import invalid

_ROLES: Final = frozenset({"user", "assistant", "system", "developer"})
_TEXTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})


def messages_of(given: str | Sequence[Any], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation in a request's `input`, with the instructions in front.

    What an earlier response has returned can be sent back as it is. Its reasoning is left out, as
    chat templates leave out that of earlier answers. Raises ApiError (400).
    """
    found: list[dict[str, Any]] = []
    if instructions:
        found.append({"role": "system", "content": instructions})
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not items:
        raise invalid("input", "must not be empty")
    for i, item in enumerate(items):
        _add(found, item, f"input[{i}]")
    return found


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    if not isinstance(item, Mapping):
        raise invalid(where, "is not an object")
    match item.get("type", "message"):
        case "message":
            messages.append(_message(item, where))
        case "function_call":
            _add_call(messages, item, where)
        case "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": _text(item, "call_id", where),
                    "content": _joined(item.get("output"), f"{where}.output"),
                }
            )
        case "reasoning":
            pass
        case "item_reference":
            text = "refers to a stored item, and nothing is stored here; send the item itself"
            raise invalid(where, text)
        case other:
            raise invalid(f"{where}.type", f"{str(other)[:64]!r} is not supported")


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = _text(item, "role", where)
    if role not in _ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(sorted(_ROLES))}")
    return {"role": role, "content": _joined(item.get("content"), f"{where}.content")}


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Adds a call to the message of the assistant before it, or to one of its own."""
    function = {
        "name": _text(item, "name", where),
        "arguments": _text(item, "arguments", where) or "{}",
    }
    call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise invalid(f"{where}.{key}", "is missing" if value is None else "is not a text")
    return value


def _joined(content: Any, where: str) -> str:
    """A text, or the texts of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, "is neither a text nor a list of parts")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise invalid(where, "is not an object")
    kind = part.get("type", "input_text")
    if kind == "refusal":
        return _text(part, "refusal", where)
    if kind not in _TEXTS:
        shown = str(kind)[:64]
        raise invalid(f"{where}.type", f"{shown!r} is not supported; this model reads text only")
    return _text(part, "text", where)
