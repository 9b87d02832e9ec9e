"""Lines of a JSONL file to examples, strictly: what is not understood is refused, never guessed at.

A line is one JSON object of one of four shapes; a file may mix them:

    {"messages": [{"role": "user", "content": …}, …, {"role": "assistant", "content": …}]}
    {"prompt": …, "completion": …}        two strings, or two lists of messages
    {"instruction": …, "input": …, "output": …}        input may be missing or ""
    {"text": …}

Keys that say something about an example rather than in it (`NOTES`, and any that starts with "_")
are ignored and counted. Any other key is refused: it may be a misspelt one, or change what the
example means. A byte order mark at the beginning of a file and CRLF line ends are taken.
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
"""Bytes. Tokens of a whole data set are held in memory, 16 bytes each."""

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
class Record:
    """An example as it was written.

    Attributes:
        shape: "messages", "prompt", "instruction" or "text".
        messages: the conversation, its last turn an answer; () for "text". A prompt or instruction
            is a user's turn, its completion or output the answer.
        answer: index of the first message that is the completion; of the last one for "messages".
        text: of "text", else "".
        plain: the prompt as it is put to a base without chat template, or None: it needs one.
        line: from 1.
    """

    shape: str
    messages: tuple[Message, ...]
    answer: int
    text: str
    plain: str | None
    line: int

    def digest(self) -> bytes:
        """SHA-256 of what is learned from, whatever the shape or layout of the line."""
        words = [[m["role"], m["content"]] for m in self.messages] or self.text
        return hashlib.sha256(json.dumps(words).encode()).digest()


class RecordFile:
    """A JSONL file, read once from its beginning to its end.

    Attributes:
        digest: SHA-256 (hex) of the file's bytes, once it has been read.
        ignored: keys that were ignored, and how often.
    """

    def __init__(self, path: Path, problems: Problems) -> None:
        """Bad lines go to `problems`."""
        self.path = path
        self.digest = ""
        self.ignored: Counter[str] = Counter()
        self._problems = problems

    def __iter__(self) -> Iterator[Record]:
        """The good lines.

        Raises Refusal (DATA_INVALID): no such file, nothing in it, or too much.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise Refusal(Reason.DATA_INVALID, f"{self.path} is not a file; give a JSONL file")
            size = self.path.stat().st_size
            if size > MAX_FILE:
                raise Refusal(
                    Reason.DATA_INVALID,
                    f"{self.path} holds {size:,} bytes; the most is {MAX_FILE:,}: train on a part",
                )
            with self.path.open("rb") as file:
                yield from self._records(file)
        except OSError as error:
            raise Refusal(
                Reason.DATA_INVALID, f"cannot read {self.path}: {error.strerror or error}"
            ) from error

    def _records(self, file: BinaryIO) -> Iterator[Record]:
        sha, number = hashlib.sha256(), 0
        for number, line in enumerate(_lines(file, sha.update), 1):
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"is longer than {MAX_LINE:,} bytes")
                first = number == 1
                yield self._record(line.removeprefix(b"\xef\xbb\xbf") if first else line, number)
            except ValueError as error:
                self._problems.add(self.path, number, str(error))
        if not number:
            raise Refusal(
                Reason.DATA_INVALID,
                f"{self.path} is empty; each line is an example, such as {_WANTED}",
            )
        self.digest = sha.hexdigest()

    def _record(self, line: bytes, number: int) -> Record:
        """Raises ValueError with the reason."""
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
    """Lines without their ends; of one that is too long only the beginning is kept in memory."""
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
        raise ValueError(
            f'has keys that are not understood: {keys}; remove them, or put them under "meta"'
        )
    missing = [key for key in _SHAPES[shapes[0]][:2] if key not in value]
    if missing:
        raise ValueError(f'has no "{missing[0]}"')
    return shapes[0]


def _messages_record(value: Mapping[str, object], line: int) -> Record:
    messages = _conversation(_messages(value["messages"], "messages"))
    return Record("messages", messages, len(messages) - 1, "", None, line)


def _prompt_record(value: Mapping[str, object], line: int) -> Record:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
        if after[0]["role"] != "assistant":
            raise ValueError(
                f'completion begins with the role "{after[0]["role"]}"; want assistant'
            )
        return Record("prompt", _conversation(before + after), len(before), "", None, line)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("mixes a string and a list; prompt and completion are of one kind")
    asked = _filled(prompt, "prompt")
    return _exchange("prompt", asked, asked, _filled(completion, "completion"), line)


def _instruction_record(value: Mapping[str, object], line: int) -> Record:
    asked = _filled(value["instruction"], "instruction")
    given = _string(value.get("input", ""), "input")
    if given.strip():
        asked = f"{asked}\n\n{given}"
    return _exchange("instruction", asked, f"{asked}\n", _filled(value["output"], "output"), line)


def _text_record(value: Mapping[str, object], line: int) -> Record:
    return Record("text", (), 0, _filled(value["text"], "text"), None, line)


def _exchange(shape: str, asked: str, plain: str, answer: str, line: int) -> Record:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Record(shape, messages, 1, "", plain, line)


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
            raise ValueError(f'{what} has a "{shown(key)}", which is not understood; remove it')
    role = _string(turn["role"], f"{what}.role")
    if role not in ROLES:
        raise ValueError(f'{what} has the role "{shown(role)}"; roles are {", ".join(ROLES)}')
    # an empty system message is a way to have none where a template would write its own
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
        raise ValueError(f"{what} holds half a surrogate pair, which is no character") from None
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
