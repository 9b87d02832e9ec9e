"""Checks of single values of an example. The messages complete the sentence "this line …"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loraplex_adapters.format.strict_json import loads

from loraplex_training.data.problems import Dropped

DEEPEST: Final = 100
"""Levels of nesting of a tool's description or of a call's arguments."""
_KINDS: Final = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}


def kind_of(value: object) -> str:
    """Returns what a JSON value is, for messages."""
    if value is None:
        return "null"
    # Parquet has more kinds than JSON.
    other = f"a value of the type {type(value).__name__}"
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else other)


def string(value: object, what: str) -> str:
    """Returns a string. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind_of(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} contains half a surrogate pair, which is not a character"
        ) from None
    return value


def filled(value: object, what: str) -> str:
    """Returns a string with content. Raises ValueError, Dropped."""
    text = string(value, what)
    if not text.strip():
        raise Dropped(f'has nothing under "{what.partition("[")[0]}"', f"{what} is empty")
    return text


def items(value: object, what: str, of: str) -> list[Any]:
    """Returns a list, which tables and some files hold as a JSON string. Raises ValueError."""
    if isinstance(value, str):
        value = _decoded(value, list, value)
    if not isinstance(value, list):
        raise ValueError(f"{what} is {kind_of(value)}, not a list of {of}")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """Returns an object, which may be a JSON string. Raises ValueError."""
    if isinstance(value, str):
        value = _decoded(value, dict, value) if value.strip() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {kind_of(value)}, not an object")
    return value


def check_strings(value: object, what: str, depth: int = 0) -> None:
    """Raises ValueError if a string anywhere in a JSON value is no text, or it is too deep."""
    if depth > DEEPEST:
        raise ValueError(f"{what} is nested more than {DEEPEST} deep")
    if isinstance(value, str):
        string(value, what)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            string(key, what)
            check_strings(inner, what, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_strings(inner, what, depth + 1)


def _decoded(text: str, wanted: type, otherwise: object) -> object:
    try:
        value = loads(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return otherwise
    return value if isinstance(value, wanted) else otherwise
