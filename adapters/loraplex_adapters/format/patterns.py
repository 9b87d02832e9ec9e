"""PEFT's matching of module names, for plain names only.

PEFT tries the keys of `rank_pattern` and `alpha_pattern` in turn as `(.*\\.)?(KEY)$` and takes the
first that matches. A key out of a file may be an expression that runs for hours, so only names
joined by dots are taken; in them a dot still stands for any character, as it does for PEFT.

The order of the keys is not to be trusted: PEFT trains with the order that the author wrote and
saves them sorted. Where the order would decide, the file does not say what was trained.
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
"""Dotted keys that equal no module's name are compared one by one; more of them are not."""

_NAME = frozenset(string.ascii_letters + string.digits + "_")


@dataclass(frozen=True, slots=True)
class Matched(Generic[Value]):
    """What a pattern says of each module.

    Attributes:
        values: by module path, for the modules that some key matches.
        conflict: (module path, key, key) of two keys that disagree, or None.
    """

    values: Mapping[str, Value]
    conflict: tuple[str, str, str] | None


def is_plain(name: str) -> bool:
    """Whether `name` is a module's name, or several joined by dots, and nothing else."""
    return len(name) <= MAX_NAME and all(
        part and _NAME.issuperset(part) for part in name.split(".")
    )


@lru_cache(1 << 14)
def suffixes(path: str) -> tuple[str, ...]:
    """`path` and what follows each of its dots: what a plain key has to equal to match it."""
    parts = path.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def match(pattern: Mapping[str, Value], paths: Collection[str]) -> Matched[Value]:
    """Looks the module paths up in a pattern of plain keys; raises ValueError for too many keys."""
    if not pattern:
        return Matched({}, None)
    names = {suffix for path in paths for suffix in suffixes(path)}
    foreign = [key for key in pattern if "." in key and key not in names]
    if len(foreign) > MAX_FOREIGN_KEYS:
        raise ValueError(f"has more than {MAX_FOREIGN_KEYS} keys that name no module of the file")
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
