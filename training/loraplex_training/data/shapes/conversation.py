"""Messages of a conversation, in the forms in which data sets write them.

A message has its role under "role" or "from" and its content under "content" or "value". Roles and
content become those that chat templates read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_adapters.format.strict_json import shown

from loraplex_training.data.problems import Dropped
from loraplex_training.data.shapes.calls import calls_in, calls_of
from loraplex_training.data.shapes.record import Message
from loraplex_training.data.shapes.values import check_strings, items, kind_of, string

ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model"),
    "tool": ("tool", "observation", "function_response", "tool_response", "function", "ipython"),
    "call": ("function_call", "tool_call"),
}
"""Roles of chat templates and the names that files give them, in any case of letters. A "call" is
a message of the assistant whose content is a tool call as JSON."""
_ROLE_OF: Final = {name: role for role, names in ROLES.items() for name in names}

LEARN_KEYS: Final = (
    *("weight", "train", "training", "train_on_turn", "trainable", "learn", "loss"),
)
"""Keys of a message that say whether it is learned: true or 1, false or 0."""
NOTES_OF_MESSAGES: Final = frozenset(
    {"id", "uuid", "annotations", "timestamp", "date", "metadata", "meta", "comment"}
)
"""Keys of a message that are ignored."""
TEXT_PARTS: Final = ("text", "input_text", "output_text")
"""Types of parts of a content that are read."""
_KEPT: Final = ("name", "tool_call_id", "reasoning_content")
_TAKEN: Final = frozenset(
    {*_KEPT, *LEARN_KEYS, "role", "from", "content", "value", "tool_calls", "function_call"}
)


@dataclass(frozen=True, slots=True)
class SpokenTurns:
    """Messages, and the indices of those of the assistant that are not to be learned."""

    messages: tuple[Message, ...]
    given: frozenset[int]

    def __add__(self, other: SpokenTurns) -> SpokenTurns:
        moved = (at + len(self.messages) for at in other.given)
        return SpokenTurns(self.messages + other.messages, self.given.union(moved))


def turns_of(value: object, what: str, ignored: Counter[str], lenient: bool = False) -> SpokenTurns:
    """Returns a list of messages, and counts in `ignored` the keys of messages that it ignores.

    Unknown keys are refused, or ignored if `lenient`.

    Raises:
        ValueError, Dropped: the messages cannot be used.
    """
    messages: list[Message] = []
    given = set()
    for at, turn in enumerate(items(value, what, "messages")):
        message, learned = _message(turn, f"{what}[{at}]", ignored, lenient)
        if learned is False and message["role"] == "assistant":
            given.add(at)
        messages.append(message)
    if not messages:
        raise Dropped(f'has nothing under "{what}"', f"{what} is empty")
    return SpokenTurns(tuple(messages), frozenset(given))


def check_conversation(turns: SpokenTurns) -> None:
    """Raises Dropped if a conversation has nothing to learn or is not in order."""
    roles = [message["role"] for message in turns.messages]
    if "system" in roles[1:]:
        raise Dropped("has a system message that is not the first one")
    if roles[-1] != "assistant":
        raise Dropped(
            f'ends with a message of the role "{roles[-1]}"; it must end with an answer (assistant)'
        )
    if all(at in turns.given for at, role in enumerate(roles) if role == "assistant"):
        raise Dropped("has no answer to learn, since all of them have the weight 0")


def _message(
    turn: object, what: str, ignored: Counter[str], lenient: bool
) -> tuple[Message, bool | None]:
    """Returns a message, and whether it is to be learned; None if it does not say so."""
    if not isinstance(turn, dict):
        raise ValueError(f"{what} is {kind_of(turn)}, not an object with role and content")
    role_key = _one_of(("role", "from"), turn, what)
    role = string(turn[role_key], f"{what}.{role_key}")
    known = _ROLE_OF.get(role.lower())
    if known is None:
        raise ValueError(
            f'{what} has the role "{shown(role)}"; roles are {", ".join(_ROLE_OF)}; name what it '
            f"is, as in --roles {shown(role)}=assistant"
        )
    _check_keys(turn, what, ignored, lenient)
    message: dict[str, Any] = {"role": "assistant" if known == "call" else known}
    calls = _calls(turn, what)
    message["content"] = _content(turn, message["role"], what, bool(calls))
    if known == "call" and (found := calls_in(message["content"] or "")):
        message["content"], calls = None, found
    for key in _KEPT:
        if key in turn:
            message[key] = string(turn[key], f"{what}.{key}")
    if calls:
        if message["role"] != "assistant":
            raise ValueError(f"{what} has tool calls, which only the assistant can make")
        message["tool_calls"] = calls
    return message, _learned(turn, message["role"], what)


def _one_of(keys: tuple[str, str], turn: Mapping[str, object], what: str) -> str:
    found = [key for key in keys if key in turn]
    if len(found) == 2:
        raise ValueError(f'{what} has "{keys[0]}" and "{keys[1]}"; it must have one of them')
    if not found:
        raise ValueError(f'{what} has no "{keys[0]}"')
    return found[0]


def _check_keys(
    turn: Mapping[str, object], what: str, ignored: Counter[str], lenient: bool
) -> None:
    for key in turn:
        if key in _TAKEN:
            continue
        if not lenient and key not in NOTES_OF_MESSAGES and not key.startswith("_"):
            raise ValueError(
                f'{what} has the unknown key "{shown(key)}"; use --shape to say which shape the '
                "lines have, and such keys are ignored"
            )
        ignored[f"{key} (of messages)"] += 1


def _calls(turn: Mapping[str, object], what: str) -> list[dict[str, Any]]:
    if "tool_calls" in turn:
        return calls_of(turn["tool_calls"], f"{what}.tool_calls")
    if "function_call" in turn:
        return calls_of([turn["function_call"]], f"{what}.function_call")
    return []


def _content(turn: Mapping[str, object], role: str, what: str, calls: bool) -> Any:
    """Returns a string, a list of parts of text, or None beside calls."""
    if "content" not in turn and "value" not in turn:
        if calls:
            return None
        raise Dropped("has a message without content", f'{what} has no "content"')
    key = _one_of(("content", "value"), turn, what)
    content = turn[key]
    if isinstance(content, list):
        parts = [_part(part, f"{what}.{key}[{at}]") for at, part in enumerate(content)]
        texts = [part["text"] for part in parts]
        content = parts if len(parts) > 1 else "".join(texts)
    else:
        content = string(content, f"{what}.{key}")
        texts = [content]
    # An empty system message suppresses the one that a template would add; a tool may return "".
    if role in ("user", "assistant") and not calls and not "".join(texts).strip():
        raise Dropped("has a message that is empty", f"{what}.{key} is empty")
    return content


def _part(part: object, what: str) -> dict[str, str]:
    if not isinstance(part, dict):
        raise ValueError(f"{what} is {kind_of(part)}, not an object with type and text")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        name = shown(kind) if isinstance(kind, str) else kind_of(kind)
        raise ValueError(f'{what} is of the type "{name}"; only text can be trained on')
    if "text" not in part:
        raise ValueError(f'{what} has no "text"')
    return {"type": "text", "text": string(part["text"], f"{what}.text")}


def _learned(turn: Mapping[str, object], role: str, what: str) -> bool | None:
    found = {}
    for key in LEARN_KEYS:
        if key in turn:
            value = turn[key]
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise ValueError(
                    f"{what}.{key} is {shown(repr(value), 40)}; possible are 0 (the message is not "
                    "learned) and 1"
                )
            found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise ValueError(f"{what} contradicts itself: {found}".replace("'", '"'))
    wanted = next(iter(found.values()), None)
    if wanted and role != "assistant":
        raise ValueError(
            f'{what} asks to learn a message of the role "{role}"; only answers of the assistant '
            "are learned one by one (--learn all learns everything)"
        )
    return wanted


def texts_of(turns: Sequence[Message], role: str) -> list[str]:
    """Returns the contents of all messages of a role; parts of text are joined."""
    made = []
    for message in turns:
        content = message["content"]
        if message["role"] == role and content is not None:
            parts = content if isinstance(content, list) else [{"text": content}]
            made.append("".join(part["text"] for part in parts))
    return made


def tidy(variables: Mapping[str, object], what: str) -> Mapping[str, object]:
    """Returns the variables of a chat template. Raises ValueError for what is no simple value."""
    for key, value in variables.items():
        string(key, what)
        if not isinstance(value, str | bool | int | float):
            raise ValueError(f"{what}.{shown(key)} is {kind_of(value)}, not a simple value")
        check_strings(value, what)
    return variables
