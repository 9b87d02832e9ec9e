"""The keys of `rank_pattern` and `alpha_pattern`, matched with modules as in PEFT.

PEFT tries the keys in turn as `(.*\\.)?(KEY)$` and uses the first that matches. Most keys are plain
names, which a look-up finds; a dot in them matches any character, as in PEFT. So are names with an
anchor or escaped dots. Other keys are expressions (`format.expressions`), which are never given to
Python's `re`.

The order of the keys in a file is meaningless: PEFT trains with the author's order and saves the
keys sorted. If the order would decide, the file does not determine what was trained.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from loraplex_adapters.format.expressions.automaton import Work, ending, find
from loraplex_adapters.format.expressions.names import Names

Value = TypeVar("Value", int, float)

MAX_NAME = 256
MAX_FOREIGN_KEYS = 256
"""Most dotted keys that equal no module's name, since these are compared one by one."""

MAX_EXPRESSIONS = 256
"""Most keys that are expressions, since each is compared with every module."""

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
    """Matches module paths with a pattern; raises ValueError if that would take too long."""
    values: dict[str, Value] = {}
    chosen: dict[str, str] = {}
    conflict = None
    for key, path in _pairs(pattern, paths):
        if path in values and values[path] != pattern[key]:
            conflict = conflict or (path, chosen[path], key)
        chosen.setdefault(path, key)
        values.setdefault(path, pattern[key])
    return Matched(values, conflict)


def _pairs(pattern: Collection[str], paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every key with every path that it matches."""
    if not pattern:
        return
    plain = {key for key in pattern if is_plain(key)}
    names = {suffix for path in paths for suffix in suffixes(path)}
    spelt = _spelt((key for key in pattern if key not in plain), paths, names)
    expressions = [key for key in pattern if key not in plain and key not in spelt]
    foreign = [key for key in plain if "." in key and key not in names]
    if len(foreign) > MAX_FOREIGN_KEYS:
        raise ValueError(f"has more than {MAX_FOREIGN_KEYS} keys that match no module of the file")
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(
            f"has {len(expressions)} keys that are expressions; at most {MAX_EXPRESSIONS} are "
            "evaluated: write the modules' names instead"
        )
    by_name: dict[tuple[str, bool], list[str]] = {}
    for key, place in spelt.items():
        by_name.setdefault(place, []).append(key)
    for path in paths:
        yield from ((key, path) for key in by_name.get((path, True), ()))
        for suffix in suffixes(path):
            yield from ((key, path) for key in by_name.get((suffix, False), ()))
            if suffix in plain:
                yield suffix, path
            yield from ((key, path) for key in foreign if _any_for_dot(key, suffix))
    if expressions:
        work, tree = Work(), Names.of(paths)
        for key in expressions:
            work.spend(len(key))
            yield from ((key, path) for path in sorted(find(ending(key), tree, work)))


def _spelt(
    keys: Iterable[str], paths: Collection[str], names: Set[str]
) -> dict[str, tuple[str, bool]]:
    """Keys that are a name but for anchors and escaped dots: the name, and if it is a whole path.

    Keys that name no module and have other dots are left out, since these match any character.
    """
    whole = frozenset(paths)
    found = {}
    for key in keys:
        is_whole = key.startswith("^")
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        is_literal = "." not in key.replace("\\.", "")
        if is_plain(name) and (is_literal or name in (whole if is_whole else names)):
            found[key] = name, is_whole
    return found


def _any_for_dot(key: str, name: str) -> bool:
    return len(key) == len(name) and all(k in (".", n) for k, n in zip(key, name, strict=True))
