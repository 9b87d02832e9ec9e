"""What a chat template takes of messages, found by trying, and messages adapted to that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_model.checkpoints.chat_sandbox import TextRefused, TooMuchWork

_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
"""Names of an assistant's reasoning; the first one is the usual one."""

_WORD, _OTHER, _NAME, _CITY = "qx7probe", "zk4other", "fn9tool", "ci3town"
"""Words that no template contains."""

Run = Callable[[list[dict[str, Any]], Any, bool, Mapping[str, Any]], str]
"""Renders messages with tools (or None), add_generation_prompt and further variables."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template does with messages.

    Attributes:
        parts: it renders content that is a list of parts; otherwise the parts' texts are joined.
        left_out: roles whose messages it leaves out without a word.
        developer: it renders the role "developer", and not as it does any word; otherwise the
            messages of this role become the system's.
        tool_calls: it renders the calls of an assistant.
        text_arguments: it wants the arguments of a call as the text of a JSON object.
    """

    parts: bool = False
    left_out: frozenset[str] = frozenset()
    developer: bool = True
    tool_calls: bool = True
    text_arguments: bool = False


def probe(run: Run, takes_tools: bool) -> Abilities:
    """Finds out what a template takes, by rendering short conversations. Raises TooMuchWork."""
    asked = {"role": "user", "content": _OTHER}
    parts = _tried(run, [{"role": "user", "content": [{"type": "text", "text": _WORD}]}])
    developer = _tried(run, [{"role": "developer", "content": _WORD}, asked])
    unknown = _tried(run, [{"role": _NAME, "content": _WORD}, asked])
    system = _tried(run, [{"role": "system", "content": _WORD}, asked])
    tools = [_TOOL] if takes_tools else None
    as_map = _tried(run, _calling({"city": _CITY}), tools)
    as_text = _tried(run, _calling(json.dumps({"city": _CITY})), tools)
    called = as_map if _names(as_map) else as_text
    answered = _tried(run, [*_calling({"city": _CITY}), _ANSWER], tools)
    if answered is None:
        answered = _tried(run, [*_calling(json.dumps({"city": _CITY})), _ANSWER], tools)
    left_out = set()
    if system is not None and _WORD not in system:
        left_out.add("system")
    if answered is not None and _WORD not in answered:
        left_out.add("tool")
    return Abilities(
        parts=parts is not None and _WORD in parts and "'type'" not in parts,
        left_out=frozenset(left_out),
        developer=developer is not None
        and _WORD in developer
        and (developer != unknown or "system" in left_out),
        tool_calls=called is None or _names(called),
        text_arguments=not _names(as_map) or f"'{_CITY}'" in (as_map or ""),
    )


_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_ANSWER: Final = {"role": "tool", "tool_call_id": "abcdefghi", "name": _NAME, "content": _WORD}


def _calling(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": _NAME, "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return [
        {"role": "user", "content": _OTHER},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


def _names(text: str | None) -> bool:
    """Whether a rendered call shows its argument, which a description of tools does not."""
    return text is not None and _CITY in text


def _tried(run: Run, chat: list[dict[str, Any]], tools: Any = None) -> str | None:
    """The rendered text; None if the template refuses. Raises TooMuchWork."""
    try:
        return run(chat, tools, False, {})
    except TooMuchWork:  # for a conversation of two words: what follows would cost as much again
        raise
    except TextRefused:
        return None


def adapted(messages: Sequence[Mapping[str, Any]], able: Abilities) -> list[dict[str, Any]]:
    """Copies of messages in the form that a template takes.

    Raises TextRefused for a message that the template would leave out.
    """
    return [_adapted(dict(message), able) for message in messages]


def _adapted(message: dict[str, Any], able: Abilities) -> dict[str, Any]:
    role = message.get("role")
    if role == "developer" and not able.developer:
        message["role"] = role = "system"
    if role in able.left_out and message.get("content"):
        raise TextRefused(f"the chat template leaves messages of the role {role} out")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = (
            [dict(part) for part in content] if able.parts else joined_text(content)
        )
    if message.get("tool_calls"):
        if not able.tool_calls:
            raise TextRefused("the chat template leaves tool calls out")
        message["tool_calls"] = [_call(call, able.text_arguments) for call in message["tool_calls"]]
    thought = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    return message


def joined_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """The texts of a content's parts, one after the other on lines of their own."""
    return "\n".join(str(part["text"]) for part in parts if part.get("type", "text") == "text")


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function}
