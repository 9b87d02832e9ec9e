"""PEFT's matching of module names, for plain names only.

PEFT tries the keys of `rank_pattern` and `alpha_pattern` in turn as `(.*\\.)?(KEY)$` and uses the
first that matches. A key in a file could be an expression that runs for hours, so only names joined
by dots are accepted; a dot in them matches any character, as in PEFT.

The order of the keys in a file is meaningless: PEFT trains with the author's order and saves the
keys sorted. If the order would decide, the file does not determine what was trained.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

Value = TypeVar("Value", int, float)

MAX_NAME = 256
MAX_FOREIGN_KEYS = 256
"""Most dotted keys that equal no module's name, since these are compared one by one."""

_NAME = frozenset(string.ascii_letters + string.digits + "_")


@dataclass(frozen=True, slots=True)
class Matched(Generic[Value]):
    """The values that a pattern gives to modules.

    Attributes:
        values: value by module path, for the modules that a key matches.
        conflict: module path and two keys that disagree about it; None if there is no conflict.
    """

    values: Mapping[str, Value]
    conflict: tuple[str, str, str] | None


def is_plain(name: str) -> bool:
    """Whether `name` consists of one or more module names joined by dots."""
    return len(name) <= MAX_NAME and all(
        part and _NAME.issuperset(part) for part in name.split(".")
    )


@lru_cache(1 << 14)
def suffixes(path: str) -> tuple[str, ...]:
    """Returns `path` and its parts after each dot; a plain key matches if it equals one of them."""
    parts = path.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def match(pattern: Mapping[str, Value], paths: Collection[str]) -> Matched[Value]:
    """Matches module paths with a pattern of plain keys; raises ValueError for too many keys."""
    if not pattern:
        return Matched({}, None)
    names = {suffix for path in paths for suffix in suffixes(path)}
    foreign = [key for key in pattern if "." in key and key not in names]
    if len(foreign) > MAX_FOREIGN_KEYS:
        raise ValueError(f"has more than {MAX_FOREIGN_KEYS} keys that match no module of the file")
    values: dict[str, Value] = {}
    conflict = None
    for path in paths:
        first = ""
        for suffix in suffixes(path):
            equal = [suffix] if suffix in pattern else []
            for key in equal + [key for key in foreign if _any_for_dot(key, suffix)]:
                if path in values and values[path] != pattern[key]:
                    conflict = conflict or (path, first, key)
                first = first or key
                values.setdefault(path, pattern[key])
    return Matched(values, conflict)


def _any_for_dot(key: str, name: str) -> bool:
    return len(key) == len(name) and all(k in (".", n) for k, n in zip(key, name, strict=True))
