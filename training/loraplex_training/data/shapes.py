"""The shapes of an example, by the keys of its object.

Nothing unknown is guessed at: keys with information about an example (`NOTES`, and all that start
with "_") are ignored and counted. Any other key is refused: it may be misspelt, or change the
meaning of the example.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex_adapters.format.strict_json import shown

ROLES: Final = ("system", "user", "assistant")
NOTES: Final = frozenset(
    {
        *("id", "uid", "uuid", "idx", "index", "meta", "metadata", "source", "origin", "tags"),
        *("category", "comment", "note", "license", "url", "lang", "language", "split"),
    }
)
_SHAPES: Final[Mapping[str, tuple[str, ...]]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output", "input"),
    "text": ("text",),
}
WANTED: Final = (
    '{"messages"}, {"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}'
)
KEYS: Final = frozenset(key for keys in _SHAPES.values() for key in keys)
"""Keys that belong to a shape."""
SHAPES: Final = tuple(_SHAPES)
"""Names of the shapes."""
_KINDS: Final = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """An example as written in its file.

    Attributes:
        shape: "messages", "prompt", "instruction" or "text".
        messages: the conversation, which ends with an answer; () for "text". A prompt or
            instruction is a turn of the user, its completion or output the answer.
        answer: index of the completion's first message; of the last message for "messages".
        text: the text of the shape "text", else "".
        plain: the prompt for a base model without chat template; None if one is needed.
        line: line number, from 1.
    """

    shape: str
    messages: tuple[Message, ...]
    answer: int
    text: str
    plain: str | None
    line: int

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content, whatever the shape or layout of the line."""
        words = [[m["role"], m["content"]] for m in self.messages] or self.text
        return hashlib.sha256(json.dumps(words).encode()).digest()


def read_record(
    value: Mapping[str, object], line: int, ignored: Counter[str], given: str = ""
) -> DataRecord:
    """Returns the example that an object describes, and counts the keys that it ignores.

    If the shape is `given`, all keys of others are ignored.

    Raises:
        ValueError: the object is not an example; the message completes "this line …".
    """
    shape = _shape({k: v for k, v in value.items() if k in _SHAPES[given]} if given else value)
    for key in value.keys() - set(_SHAPES[shape]):
        ignored[key] += 1
    return _BUILDERS[shape](value, line)


def _shape(value: Mapping[str, object]) -> str:
    shapes = [shape for shape, keys in _SHAPES.items() if not value.keys().isdisjoint(keys)]
    if len(shapes) > 1:
        keys = ", ".join(f'"{k}"' for shape in shapes for k in _SHAPES[shape] if k in value)
        raise ValueError(f"mixes shapes ({keys}); it must be one of {WANTED}")
    known = {*NOTES, *(_SHAPES[shapes[0]] if shapes else ())}
    others = [key for key in value if key not in known and not key.startswith("_")]
    if not shapes:
        has = ", ".join(f'"{shown(k)}"' for k in list(value)[:8]) or "nothing"
        raise ValueError(f"holds {has}; it must be one of {WANTED}")
    if others:
        keys = ", ".join(f'"{shown(key)}"' for key in others[:8])
        raise ValueError(f'has unknown keys: {keys}; remove them, or put them under "meta"')
    missing = [key for key in _SHAPES[shapes[0]][:2] if key not in value]
    if missing:
        raise ValueError(f'has no "{missing[0]}"')
    return shapes[0]


def _messages_record(value: Mapping[str, object], line: int) -> DataRecord:
    messages = _conversation(_messages(value["messages"], "messages"))
    return DataRecord("messages", messages, len(messages) - 1, "", None, line)


def _prompt_record(value: Mapping[str, object], line: int) -> DataRecord:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
        if after[0]["role"] != "assistant":
            raise ValueError(
                f'completion begins with the role "{after[0]["role"]}"; it must be assistant'
            )
        return DataRecord("prompt", _conversation(before + after), len(before), "", None, line)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError(
            "mixes a string and a list; prompt and completion must be of the same type"
        )
    asked = _filled(prompt, "prompt")
    return _exchange("prompt", asked, asked, _filled(completion, "completion"), line)


def _instruction_record(value: Mapping[str, object], line: int) -> DataRecord:
    asked = _filled(value["instruction"], "instruction")
    given = _string(value.get("input", ""), "input")
    if given.strip():
        asked = f"{asked}\n\n{given}"
    return _exchange("instruction", asked, f"{asked}\n", _filled(value["output"], "output"), line)


def _text_record(value: Mapping[str, object], line: int) -> DataRecord:
    return DataRecord("text", (), 0, _filled(value["text"], "text"), None, line)


def _exchange(shape: str, asked: str, plain: str, answer: str, line: int) -> DataRecord:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return DataRecord(shape, messages, 1, "", plain, line)


def _messages(value: object, what: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {kind_of(value)}, not a list of messages")
    if not value:
        raise ValueError(f"{what} is empty")
    return tuple(_message(turn, f"{what}[{i}]") for i, turn in enumerate(value))


def _message(turn: object, what: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{what} is {kind_of(turn)}, not an object with role and content")
    for key in ("role", "content"):
        if key not in turn:
            raise ValueError(f'{what} has no "{key}"')
    for key in turn:
        if key not in ("role", "content"):
            raise ValueError(f'{what} has the unknown key "{shown(key)}"; remove it')
    role = _string(turn["role"], f"{what}.role")
    if role not in ROLES:
        raise ValueError(f'{what} has the role "{shown(role)}"; roles are {", ".join(ROLES)}')
    # An empty system message suppresses the one that a template would add.
    check = _string if role == "system" else _filled
    return {"role": role, "content": check(turn["content"], f"{what}.content")}


def _conversation(messages: Sequence[Message]) -> tuple[Message, ...]:
    if any(m["role"] == "system" for m in messages[1:]):
        raise ValueError("has a system message that is not the first one")
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f'ends with a message of the role "{messages[-1]["role"]}"; it must end with an answer '
            "(assistant)"
        )
    return tuple(messages)


def _string(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind_of(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} contains half a surrogate pair, which is not a character"
        ) from None
    return value


def _filled(value: object, what: str) -> str:
    text = _string(value, what)
    if not text.strip():
        raise ValueError(f"{what} is empty")
    return text


def kind_of(value: object) -> str:
    """Returns what a JSON value is, for messages."""
    return "null" if value is None else _KINDS.get(type(value), "a number")


_BUILDERS: Final = {
    "messages": _messages_record,
    "prompt": _prompt_record,
    "instruction": _instruction_record,
    "text": _text_record,
}
