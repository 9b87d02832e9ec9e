"""From a form to the text of a grammar for llguidance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from loraplex_server.forms.form import FormKind, StructureForm
from loraplex_server.forms.unions import with_tagged_unions

MOST_NESTING: Final = 100
"""Brackets within brackets. The library's own parsers are recursive."""

MOST_SPACE: Final = 64
"""White space in a row between the parts of a JSON text. Models repeat it without end."""

_JSON_OPTIONS: Final[Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MOST_SPACE}}}",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
"""Replace what a schema says in "x-guidance", the library's own keyword."""

MOST_DIGITS: Final = 20
"""Characters of a whole number of 64 bits with its sign."""

_ANY_OBJECT: Final = '{"type": "object"}'


class FormInvalid(ValueError):
    """The form is at fault. The message is for its sender."""


def grammar_of(form: StructureForm) -> str:
    """The grammar of a form, not compiled yet. Raises FormInvalid."""
    match form.kind:
        case FormKind.JSON_SCHEMA:
            return _schema(form.texts[0])
        case FormKind.JSON_OBJECT:
            return _schema(_ANY_OBJECT)
        case FormKind.REGEX:
            return _regex(form.texts[0])
        case FormKind.CHOICES:
            return _choices(form.texts)
        case FormKind.GRAMMAR:
            return _cfg(form.texts[0])


def _schema(text: str) -> str:
    from llguidance import LLMatcher

    _require_shallow(text, has_classes=False)
    try:
        schema = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_constant)
    except FormInvalid:
        raise
    except ValueError as error:
        raise FormInvalid(f"is not JSON: {error}") from None
    if schema is False:
        raise FormInvalid("allows no value")
    if schema is not True and not isinstance(schema, dict):
        raise FormInvalid("is not a JSON schema: it must be an object")
    schema, is_changed = with_tagged_unions(schema)
    try:
        # Unless it was changed, the text itself is passed on, whose numbers keep their digits.
        given = json.dumps(schema, ensure_ascii=False) if is_changed else text
        given = "{}" if schema is True else given
        return LLMatcher.grammar_from_json_schema(given, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise FormInvalid(f"is not a JSON schema: {error}") from None


def _integer(digits: str) -> int:
    # The library reads a larger one as the largest that it knows.
    if len(digits) > MOST_DIGITS or not -(1 << 63) <= int(digits) < 1 << 63:
        raise FormInvalid("has a whole number beyond 64 bits, which cannot be enforced")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FormInvalid("has a number beyond the range of float64, which cannot be enforced")
    return value


def _constant(word: str) -> float:
    raise FormInvalid(f"is not JSON: {word} is not a value")


def _regex(text: str) -> str:
    from llguidance import LLMatcher

    _require_shallow(text, has_classes=True)
    return LLMatcher.grammar_from_regex(text)


def _choices(texts: Sequence[str]) -> str:
    # One terminal: its automaton is faster than a rule with as many alternatives.
    listed = " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
    return f"start: TEXT\nTEXT: {listed}\n"


def _cfg(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    _require_shallow(text, has_classes=True)
    if text.lstrip().startswith("{"):
        raise FormInvalid("is neither a Lark grammar nor one of llama.cpp (GBNF)")
    if "::=" not in text:
        return text
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the converter raises bare exceptions, and RecursionError
        raise FormInvalid(f"cannot be read as a grammar of llama.cpp (GBNF): {error}") from None


def _require_shallow(text: str, has_classes: bool) -> None:
    if nesting(text, has_classes) > MOST_NESTING:
        raise FormInvalid(f"has more than {MOST_NESTING} brackets within each other")


def nesting(text: str, has_classes: bool) -> int:
    """How many brackets are open at once, at most; those in quotes and escaped ones do not count.

    With `has_classes`, what is between square brackets is a class of characters.
    """
    depth = most = 0
    is_quoted = is_escaped = in_class = False
    for letter in text:
        if is_escaped:
            is_escaped = False
        elif letter == "\\":
            is_escaped = True
        elif in_class:
            in_class = letter != "]"
        elif letter == '"':
            is_quoted = not is_quoted
        elif is_quoted:
            continue
        elif letter == "[" and has_classes:
            in_class = True
        elif letter in "([{":
            depth += 1
            most = max(most, depth)
        elif letter in ")]}":
            depth = max(0, depth - 1)
    return most
