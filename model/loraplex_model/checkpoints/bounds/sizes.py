"""Refuses operations of templates whose result would be too large, before they are carried out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Any, Final

from loraplex_model.checkpoints.bounds.budget import Budget, TooMuchWork, fits

MAX_NUMBER: Final = 1_000_000
"""Largest number that a template may give to a function, such as the width of a padded text."""

MAX_BITS: Final = 4096
"""Largest whole number, in bits, that a template may compute with."""

SHORT: Final = 64
"""Largest number of characters of a separator or an indentation, and of digits of a rounding."""


def check_numbers(values: Iterable[Any]) -> None:
    """Raises TooMuchWork for arguments that are large numbers."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuchWork


def check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Raises TooMuchWork for an operator whose result would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = max(left.bit_length(), right.bit_length())
        if operator == "**":
            bits = max(bits, left.bit_length() * right)
        if bits > MAX_BITS:
            raise TooMuchWork
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                fits(len(value) * max(count, 0))
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
        fits(len(left) + len(right))
    if operator == "%" and isinstance(left, str):
        _check_percent(budget, left, right)


def check_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raises TooMuchWork if a method of a text would make a text or list that is too long."""
    budget.made(text)
    if name == "replace" and len(args) >= 2 and all(isinstance(v, str) for v in args[:2]):
        fits(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple | str):
        check_join(text, args[0])
    elif name in ("format", "format_map"):
        _check_braces(budget, text, (*args, *kwargs.values()))
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args else kwargs.get("sep")
        pieces = text.count(separator) if separator and name != "splitlines" else len(text) // 2
        fits(4 * pieces)


def check_join(separator: str, items: Any) -> None:
    """Raises TooMuchWork if a joined text would be too long."""
    lengths = sum(len(item) for item in items if isinstance(item, str))
    fits(len(separator) * len(items) + lengths)


def _longest(budget: Budget, given: Any) -> int:
    """A bound on the length of the text of each given value."""
    values = given.values() if isinstance(given, Mapping) else given
    longest = 0
    for value in values:
        if isinstance(value, str):
            longest = max(longest, len(value))
        elif isinstance(value, int):
            longest = max(longest, abs(value) if abs(value) <= MAX_NUMBER else SHORT)
        else:
            longest = max(longest, 16 * budget.weight(budget.walked(value)))
    return longest


def _widths(form: str) -> int:
    """The sum of all numbers that a text spells out."""
    total = number = 0
    for character in form:
        if character.isdecimal():
            number = 10 * number + int(character)
            fits(number)
        else:
            total, number = total + number, 0
            fits(total)
    return total + number


def _check_percent(budget: Budget, form: str, given: Any) -> None:
    fields = form.count("%")
    if "*" in form:  # widths that are arguments
        check_numbers(given if isinstance(given, tuple) else (given,))
    values = given if isinstance(given, tuple | Mapping) else (given,)
    fits(len(form) + _widths(form) + fields * _longest(budget, values))


def _check_braces(budget: Budget, form: str, given: tuple[Any, ...]) -> None:
    total = len(form)
    for value in given:
        if isinstance(value, Mapping):
            total += form.count("{") * _longest(budget, value)
    total += form.count("{") * _longest(budget, given)
    for _, _, width, _ in Formatter().parse(form):
        if width and "{" in width:  # widths that are put together from arguments
            raise TooMuchWork
        total += _widths(width or "")
        fits(total)
    fits(total)


def to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Noncharacters stay as they are, since the encoder's marks are such."""
    for word in (indent, *(separators or ())):
        if (len(word) if isinstance(word, str) else word or 0) > SHORT:
            raise TooMuchWork
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    fits(budget.weight(value) * max(len(word) for word in separators or ("",)))
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        size += len(piece)
        fits(size)
        pieces.append(piece)
    text = "".join(pieces)
    if ensure_ascii and "\\ufd" in text:
        # A backslash of the value itself is written as two, which are no beginning of an escape.
        parts = text.split(r"\\")
        for code in range(0xFDD0, 0xFDF0):
            parts = [part.replace(rf"\u{code:04x}", chr(code)) for part in parts]
        text = r"\\".join(parts)
    return text
