"""Which shape a line has, and which of its keys belong to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex_adapters.format.strict_json import shown
from loraplex_model.base.names import suggest

from loraplex_training.data.shapes.table import (
    ANSWERS,
    CHATS,
    CONTEXTS,
    EXCHANGES,
    HISTORY,
    KEYS,
    MEDIA,
    NAMES,
    NOTES,
    PAIRS,
    REQUEST,
    SYSTEMS,
    TEXT,
    TOKENISED,
    TOOLS,
    VARIABLES,
    WANTED,
)

_BESIDE: Final = frozenset({*SYSTEMS, *TOOLS, VARIABLES})
_KNOWN: Final = KEYS | NOTES | _BESIDE | {HISTORY}

Line = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ShapeKeys:
    """The keys of a line that its shape reads; "" for one that it has not.

    Attributes:
        shape: one of `table.NAMES`.
        asked: key of what is asked, or of the conversation or text.
        copies: keys that may hold a copy of the example, which has to be checked.
        ignored: keys that are left out.
    """

    shape: str
    asked: str
    answer: str = ""
    context: str = ""
    system: str = ""
    tools: str = ""
    copies: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def select(line: Line, given: str, named: Collection[str]) -> ShapeKeys:
    """Returns the keys of a line.

    Args:
        given: the shape, if it is not to be found; keys of others are then ignored.
        named: keys that the user has named (--columns), which precede others of the same meaning.

    Raises:
        ValueError: the keys are not those of one shape; the message completes "this line …".
    """
    if not given:
        _refuse_by_name(line)
    chats = _preferred([key for key in CHATS if key in line], named)
    if given in CHATS or (chats and not given):
        return _conversation(line, given, chats)
    if given == TEXT or (not given and not _exchange_keys(line) and TEXT in line):
        return _text(line, given)
    return _exchange(line, given, named)


def _exchange_keys(line: Line) -> list[str]:
    return [key for key in (*EXCHANGES, *ANSWERS) if key in line]


def _conversation(line: Line, given: str, chats: Sequence[str]) -> ShapeKeys:
    if given and given not in line:
        raise ValueError(f'has no "{given}"{_is_it(line, given)}')
    if not given:
        others = [k for k in _exchange_keys(line) if k != "prompt" and k not in REQUEST]
        if len(chats) > 1 or others:
            raise _mixed([*chats, *others])
    shape = given or chats[0]
    made = _beside(line, {shape, *_BESIDE})
    copies = () if given else tuple(key for key in ("prompt", TEXT) if key in line)
    ignored = _ignored(line, {shape, *_BESIDE, *copies}, NOTES | REQUEST, given, shape)
    return ShapeKeys(shape, shape, "", "", *made, copies, ignored)


def _text(line: Line, given: str) -> ShapeKeys:
    if TEXT not in line:
        raise ValueError(f'has no "{TEXT}"{_is_it(line, TEXT)}')
    return ShapeKeys(TEXT, TEXT, ignored=_ignored(line, {TEXT}, NOTES, given, TEXT))


def _exchange(line: Line, given: str, named: Collection[str]) -> ShapeKeys:
    shape, lost = _asked(line, given, named)
    answers = [key for key in ANSWERS if key in line]
    usual = EXCHANGES[shape]
    chosen = _preferred(answers, named)
    if given and usual in answers and chosen[0] not in named:
        chosen = [usual]
    if not chosen:
        if TEXT in line and not given:
            raise _mixed([shape, TEXT])
        raise ValueError(f'has no "{usual}"{_is_it(line, usual)}')
    if len(chosen) > 1:
        raise ValueError(
            f"has {_quoted(chosen)}, which may each be the answer; name it, as in "
            f"--columns {_free(line)}={chosen[0]}"
        )
    lost = [*lost, *(key for key in answers if key != chosen[0])]
    contexts = [key for key in CONTEXTS if key in line and key not in (shape, *lost)]
    if len(contexts) > 1:
        raise ValueError(
            f"has {_quoted(contexts)}, and only one further text has a place; leave one out with "
            f"--columns _{contexts[-1]}={contexts[-1]}"
        )
    own = {shape, chosen[0], *contexts, *_BESIDE, HISTORY}
    copies = (TEXT,) if TEXT in line and not given else ()
    ignored = _ignored(line, {*own, *copies, *lost}, NOTES, given, shape)
    context = contexts[0] if contexts else ""
    return ShapeKeys(shape, shape, chosen[0], context, *_beside(line, own), copies,
                     (*ignored, *lost))  # fmt: skip


def _asked(line: Line, given: str, named: Collection[str]) -> tuple[str, list[str]]:
    """Returns the key of what is asked, and others that could be, but for a named one."""
    if given:
        if given not in line:
            raise ValueError(f'has no "{given}"{_is_it(line, given)}')
        return given, []
    there = [key for key in EXCHANGES if key in line]
    found = [key for key in there if key not in CONTEXTS] or there
    chosen = _preferred(found, named)
    if len(chosen) > 1:
        free = next((k for k in EXCHANGES if k not in line and k not in CONTEXTS), "prompt")
        raise ValueError(
            f"has {_quoted(chosen)}, which may each be what is asked; name it, as in "
            f"--columns {free}={chosen[0]}, or use --shape {chosen[0]}"
        )
    if chosen:
        return chosen[0], [key for key in found if key != chosen[0]]
    if answers := [key for key in ANSWERS if key in line]:
        usual = next(asked for asked, answer in EXCHANGES.items() if answer == answers[0])
        raise ValueError(f'has no "{usual}"{_is_it(line, usual)}')
    has = ", ".join(f'"{shown(k)}"' for k in list(line)[:8]) or "nothing"
    texts = _texts(line)
    way = (
        f"; or name its keys, as in --columns prompt={texts[0]},completion={texts[1]}"
        if len(texts) > 1
        else ""
    )
    raise ValueError(f"holds {has}; it must be one of {WANTED}{way}")


def _beside(line: Line, own: Collection[str]) -> tuple[str, str]:
    """Returns the keys of the system message and of the tools."""
    made = []
    for group, what in ((SYSTEMS, "system message"), (TOOLS, "list of tools")):
        there = [key for key in group if key in line and key in own]
        if len(there) > 1:
            raise ValueError(
                f"has {_quoted(there)}, and only one {what} has a place; leave one out with "
                f"--columns _{there[-1]}={there[-1]}"
            )
        made.append(there[0] if there else "")
    return made[0], made[1]


def _ignored(
    line: Line, own: Collection[str], notes: Collection[str], given: str, shape: str
) -> tuple[str, ...]:
    """Returns the keys that are ignored. Raises ValueError for unknown ones."""
    others = [key for key in line if key not in own]
    unknown = [key for key in others if key not in notes and not key.startswith("_")]
    if given or not unknown:
        return tuple(others)
    keys = ", ".join(f'"{shown(key)}"' for key in unknown[:8])
    first = shown(unknown[0], 40)
    near = suggest(first, _KNOWN)
    answer = (
        f', or, if "{first}" is the answer, --columns prompt=text,completion={first}'
        if shape == TEXT and isinstance(line[unknown[0]], str)
        else ""
    )
    raise ValueError(
        f"has unknown keys: {keys}{near}; name what a key is, as in --columns NAME={first}, or "
        f"use --shape {shape}, which ignores unknown keys{answer}"
    )


def _refuse_by_name(line: Line) -> None:
    """Raises ValueError for examples that are of a kind that is not trained on."""
    if all(key in line for key in PAIRS):
        chat = isinstance(line["chosen"], list)
        way = (
            "--shape messages --columns messages=chosen"
            if chat
            else "--shape prompt --columns completion=chosen"
        )
        raise ValueError(
            'is a preference pair ("chosen", "rejected"), and training on preferences is not '
            f"supported; to learn the chosen answers alone, use {way}"
        )
    if isinstance(line.get("label"), bool) and "completion" in line:
        raise ValueError(
            'has a "label" of true or false beside the completion, and training on preferences is '
            "not supported; keep the lines whose label is true, and train with --shape prompt"
        )
    if TOKENISED in line:
        raise ValueError(
            f'is tokenised already ("{TOKENISED}"); give the text instead, which is tokenised for '
            "the base model"
        )
    if media := [key for key in MEDIA if line.get(key)]:
        raise ValueError(
            f'has "{media[0]}", and only text can be trained on; leave out the lines with '
            "pictures, sound or video"
        )


def _mixed(keys: Sequence[str]) -> ValueError:
    shapes = " or ".join(f"--shape {key}" for key in keys if key in NAMES)
    return ValueError(f"mixes shapes ({_quoted(keys)}); choose one with {shapes}")


def _is_it(line: Line, wanted: str) -> str:
    """Says which present key may be the one that is missing; "" if there is none."""
    texts = _texts(line)
    if not texts:
        return ""
    near = next((key for key in texts if suggest(wanted, [key])), texts[0])
    return f'; is it "{near}"? use --columns {wanted}={near}'


def _texts(line: Line) -> list[str]:
    """Returns unknown keys that hold a text or messages, and can be written in a flag."""
    return [
        key
        for key, value in line.items()
        if isinstance(value, str | list)
        and value
        and key not in _KNOWN
        and key == shown(key, 40)
        and not set(key) & set(",= '\"")
    ]


def _free(line: Line) -> str:
    """Returns the name of an answer that the line does not have."""
    return next((key for key in ANSWERS if key not in line), ANSWERS[0])


def _preferred(keys: list[str], named: Collection[str]) -> list[str]:
    return [key for key in keys if key in named] or keys


def _quoted(keys: Sequence[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
