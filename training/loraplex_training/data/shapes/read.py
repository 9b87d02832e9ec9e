"""From a line to its record, by the keys of its shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Final

from loraplex_training.data.shapes.calls import tools_of
from loraplex_training.data.shapes.conversation import (
    SpokenTurns,
    check_conversation,
    texts_of,
    tidy,
    turns_of,
)
from loraplex_training.data.shapes.keys import ShapeKeys, select
from loraplex_training.data.shapes.record import DataRecord
from loraplex_training.data.shapes.table import CHATS, HISTORY, TEXT, VARIABLES
from loraplex_training.data.shapes.values import filled, items, mapping, string

_NO_TURNS: Final = SpokenTurns((), frozenset())

Line = Mapping[str, object]


def read_record(
    value: Line,
    line: int,
    ignored: Counter[str],
    given: str = "",
    named: Collection[str] = (),
) -> DataRecord:
    """Returns the example that an object describes, and counts the keys that it ignores.

    Args:
        given: the shape, whose keys are then the only ones that are read.
        named: keys that the user has named, which precede others of the same meaning.

    Raises:
        ValueError: the object is not an example; the message completes "this line …".
        Dropped: it is one, but nothing can be learned from it.
    """
    keys = select(value, given, named)
    if keys.shape == TEXT:
        record = DataRecord(TEXT, (), 0, filled(value[TEXT], TEXT), None, line)
    elif keys.shape in CHATS:
        record = _conversation(value, keys, line, ignored, lenient=bool(given))
    else:
        record = _exchange(value, keys, line, ignored, lenient=bool(given))
    for key in (*keys.ignored, *keys.copies):
        ignored[key] += 1
    return record


def _conversation(
    value: Line, keys: ShapeKeys, line: int, ignored: Counter[str], lenient: bool
) -> DataRecord:
    turns = _with_system(value, keys, turns_of(value[keys.shape], keys.shape, ignored, lenient))
    check_conversation(turns)
    _check_copies(value, keys, turns)
    last = len(turns.messages) - 1
    return DataRecord(
        keys.shape, turns.messages, last, "", None, line, *_for_template(value, keys), turns.given
    )


def _exchange(
    value: Line, keys: ShapeKeys, line: int, ignored: Counter[str], lenient: bool
) -> DataRecord:
    asked, answer = value[keys.asked], value[keys.answer]
    plain = None
    if isinstance(asked, list):
        before = turns_of(asked, keys.asked, ignored, lenient)
        if keys.context:
            raise ValueError(f'has "{keys.context}" beside a list of messages')
    else:
        words = filled(asked, keys.asked)
        context = string(value[keys.context], keys.context) if keys.context else ""
        words = f"{words}\n\n{context}" if context.strip() else words
        plain = words if keys.shape == "prompt" else f"{words}\n"
        before = _turn("user", words)
    if isinstance(answer, list):
        after = turns_of(answer, keys.answer, ignored, lenient)
        if after.messages[0]["role"] != "assistant":
            raise ValueError(
                f'{keys.answer} begins with the role "{after.messages[0]["role"]}"; it must be '
                "assistant"
            )
        plain = None
    else:
        after = _turn("assistant", filled(answer, keys.answer))
    opening = _with_system(value, keys, _history(value) + before)
    turns = opening + after
    check_conversation(turns)
    _check_copies(value, keys, turns)
    for_template = _for_template(value, keys)
    if len(opening.messages) > 1 or any(for_template):
        plain = None
    return DataRecord(
        keys.shape,
        turns.messages,
        len(opening.messages),
        "",
        plain,
        line,
        *for_template,
        turns.given,
    )


def _turn(role: str, content: str) -> SpokenTurns:
    return SpokenTurns(({"role": role, "content": content},), frozenset())


def _history(value: Line) -> SpokenTurns:
    made = _NO_TURNS
    for at, pair in enumerate(items(value.get(HISTORY, []), HISTORY, "pairs")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{HISTORY}[{at}] is not a pair of a question and its answer")
        words = [filled(one, f"{HISTORY}[{at}][{i}]") for i, one in enumerate(pair)]
        made += _turn("user", words[0]) + _turn("assistant", words[1])
    return made


def _with_system(value: Line, keys: ShapeKeys, turns: SpokenTurns) -> SpokenTurns:
    """Returns the turns after the system message that stands beside them, if there is one."""
    content = string(value[keys.system], keys.system) if keys.system else ""
    if not content.strip():
        return turns
    first = turns.messages[0]
    if first["role"] != "system":
        return _turn("system", content) + turns
    if first["content"] != content:
        raise ValueError(
            f'has "{keys.system}" and another system message; leave out the first with --columns '
            f"_{keys.system}={keys.system}"
        )
    return turns


def _for_template(
    value: Line, keys: ShapeKeys
) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]:
    tools = tools_of(value[keys.tools], keys.tools) if keys.tools else ()
    return tools, tidy(mapping(value.get(VARIABLES, {}), VARIABLES), VARIABLES)


def _check_copies(value: Line, keys: ShapeKeys, turns: SpokenTurns) -> None:
    """Raises ValueError if a key beside the shape's own is not the copy that it should be."""
    for key in keys.copies:
        copy = value[key]
        asked, answers = texts_of(turns.messages, "user"), texts_of(turns.messages, "assistant")
        if key != TEXT:
            good = _begins(copy, turns, asked)
        else:
            words = [*asked[:1], *answers[-1:]]
            good = isinstance(copy, str) and all(one.strip() in copy for one in words)
        if not good:
            what = (
                "is not a copy of them"
                if key == TEXT
                else f'is not the beginning of "{keys.shape}"'
            )
            raise ValueError(
                f'mixes shapes ("{keys.shape}", "{key}"), and "{key}" {what}; choose one with '
                f"--shape {keys.shape} or --shape {key}"
            )


def _begins(copy: object, turns: SpokenTurns, asked: list[str]) -> bool:
    """Whether a prompt is the first question of a conversation, or its first messages."""
    if isinstance(copy, str):
        return bool(asked) and copy.strip() == asked[0].strip()
    before = turns_of(copy, "prompt", Counter(), lenient=True).messages
    return turns.messages[: len(before)] == before
