"""Reads the lines of a JSONL file as examples, strictly: nothing unknown is guessed at.

A line is one JSON object of one of four shapes; a file may mix them:

    {"messages": [{"role": "user", "content": …}, …, {"role": "assistant", "content": …}]}
    {"prompt": …, "completion": …}        two strings, or two lists of messages
    {"instruction": …, "input": …, "output": …}        input may be absent or ""
    {"text": …}

Keys with information about an example (`NOTES`, and all that start with "_") are ignored and
counted. Any other key is refused: it may be misspelt, or change the meaning of the example. A byte
order mark at the start of the file and CRLF line ends are accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from loraplex_adapters.format.strict_json import loads, shown
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_training.data.problems import Problems

MAX_LINE: Final = 1 << 20
MAX_FILE: Final = 512 << 20
"""Bytes of a file. The tokens of a whole data set are in memory, 16 bytes each."""

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
_WANTED: Final = (
    '{"messages"}, {"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}'
)
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


class RecordFile:
    """A JSONL file, to be read once.

    Attributes:
        digest: SHA-256 (hex) of the file's bytes once it has been read, else "".
        ignored: keys that were ignored, with the number of times.
    """

    def __init__(self, path: Path, problems: Problems, field: str = "data") -> None:
        """Bad lines go to `problems`; `field` is the option that names the file."""
        self.field = field
        self.path = path
        self.digest = ""
        self.ignored: Counter[str] = Counter()
        self._problems = problems

    def __iter__(self) -> Iterator[DataRecord]:
        """Yields the valid lines.

        Raises Refusal(DATA_INVALID) if the file is missing, empty or too large.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise self._refusal("is not a file; name a JSONL file")
            size = self.path.stat().st_size
            if size > MAX_FILE:
                raise self._refusal(
                    f"has {size:,} bytes; at most {MAX_FILE:,} are possible: train on a part of it"
                )
            with self.path.open("rb") as file:
                yield from self._records(file)
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror or error}") from error

    def _records(self, file: BinaryIO) -> Iterator[DataRecord]:
        sha, number = hashlib.sha256(), 0
        for number, line in enumerate(_lines(file, sha.update), 1):
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"is longer than {MAX_LINE:,} bytes")
                first = number == 1
                yield self._record(line.removeprefix(b"\xef\xbb\xbf") if first else line, number)
            except ValueError as error:
                self._problems.add(self.path, number, str(error), self.field)
        if not number:
            raise self._refusal(f"is empty; each line is an example, such as {_WANTED}")
        self.digest = sha.hexdigest()

    def _refusal(self, text: str) -> Refusal:
        return Refusal(Reason.DATA_INVALID, f"{self.path} {text}", field=self.field)

    def _record(self, line: bytes, number: int) -> DataRecord:
        """Parses a line. Raises ValueError with the reason why it cannot be used."""
        if not line.strip():
            raise ValueError("is empty; remove it")
        if line.lstrip().startswith(b"["):
            raise ValueError(f"is a JSON list; write one object on each line, one of {_WANTED}")
        value = loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"is {_kind(value)}, not an object; each line is one of {_WANTED}")
        shape = _shape(value)
        for key in value.keys() - set(_SHAPES[shape]):
            self.ignored[key] += 1
        return _BUILDERS[shape](value, number)


def _lines(file: BinaryIO, seen: Callable[[bytes], None]) -> Iterator[bytes]:
    """Yields lines without their ends; of one that is too long, only its beginning."""
    while line := file.readline(MAX_LINE + 2):
        seen(line)
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE)):
            seen(rest)
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def _shape(value: Mapping[str, object]) -> str:
    shapes = [shape for shape, keys in _SHAPES.items() if not value.keys().isdisjoint(keys)]
    if len(shapes) > 1:
        keys = ", ".join(f'"{k}"' for shape in shapes for k in _SHAPES[shape] if k in value)
        raise ValueError(f"mixes shapes ({keys}); it must be one of {_WANTED}")
    known = {*NOTES, *(_SHAPES[shapes[0]] if shapes else ())}
    others = [key for key in value if key not in known and not key.startswith("_")]
    if not shapes:
        has = ", ".join(f'"{shown(k)}"' for k in list(value)[:8]) or "nothing"
        raise ValueError(f"holds {has}; it must be one of {_WANTED}")
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
        raise ValueError(f"{what} is {_kind(value)}, not a list of messages")
    if not value:
        raise ValueError(f"{what} is empty")
    return tuple(_message(turn, f"{what}[{i}]") for i, turn in enumerate(value))


def _message(turn: object, what: str) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"{what} is {_kind(turn)}, not an object with role and content")
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
        raise ValueError(f"{what} is {_kind(value)}, not a string")
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


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")


_BUILDERS: Final = {
    "messages": _messages_record,
    "prompt": _prompt_record,
    "instruction": _instruction_record,
    "text": _text_record,
}
