"""A strict JSON parser for untrusted files.

The standard parser keeps the last of two equal keys, accepts NaN, Infinity and 1e400, and raises
RecursionError for deep nesting. Here each of these raises ValueError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

MAX_INTEGER_DIGITS = 19
"""Most digits of a signed 64-bit number."""


def loads(data: bytes) -> object:
    """Parses UTF-8 JSON; raises ValueError with a message that is safe to show."""
    try:
        return json.loads(data.decode("utf-8"), **_STRICT)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None


def decode_from(text: str, start: int) -> tuple[object, int]:
    """Parses the JSON value that begins at `start` of a longer text.

    Returns the value and the index of the character after it. Raises ValueError as `loads` does.
    """
    try:
        return json.JSONDecoder(**_STRICT).raw_decode(text, start)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at character {error.pos - start}") from None


def shown(text: str, limit: int = 120) -> str:
    """Returns a text from a file in a form that is safe in a message: printable ASCII, cut."""
    plain = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"contains {word}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("contains a number that is too large")
    return value


def _bounded(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError("contains a number that is too large")
    return int(text)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"contains the key {shown(key)} twice")
            seen.add(key)
    return unique


_STRICT: Final[Mapping[str, Any]] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "parse_int": _bounded,
    "object_pairs_hook": _unique,
}
