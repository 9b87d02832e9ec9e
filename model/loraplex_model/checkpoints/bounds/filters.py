"""Filters and tests of templates, with bounds on what they are given and what they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MappingView, Sized
from functools import wraps
from typing import Any, Final

from loraplex_model.checkpoints.bounds.budget import (
    CHARACTERS,
    NODES,
    Budget,
    TooMuchWork,
    fits,
)
from loraplex_model.checkpoints.bounds.sizes import (
    SHORT,
    check_join,
    check_method,
    check_numbers,
    check_operator,
)

_AT_ONCE: Final = {
    *("length", "count", "first", "last", "default", "d", "items", "attr", "safe", "string"),
    *("map", "select", "reject", "selectattr", "rejectattr", "random", "batch"),
}
"""Filters that do not walk through what they are given, or only as far as their result is read."""

_ORDERING: Final = ("sort", "groupby", "unique", "dictsort", "min", "max", "sum")
"""Filters that do more with each value than look at it."""

_SLOW: Final = ("urlize", "striptags", "wordwrap", "urlencode", "xmlattr", "pprint", "title")
"""Filters whose time may grow as the square of a text's length, or that are slow."""

_SLOW_CHARACTERS: Final = 10_000

_ATTRIBUTE: Final = {
    **dict.fromkeys(("groupby", "selectattr", "rejectattr", "sum"), 1),
    **dict.fromkeys(("min", "max", "unique", "join"), 2),
    "sort": 3,
}
"""Position of the name of an attribute among a filter's arguments."""

_COMPARING: Final = {
    *("in", "eq", "==", "equalto", "ne", "!=", "gt", ">", "greaterthan", "ge", ">="),
    *("lt", "<", "lessthan", "le", "<=", "lower", "upper"),
}


def bounded_filter(budget: Budget, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `name` with bounds."""
    leading = 1 if hasattr(work, "jinja_pass_arg") else 0

    @wraps(work)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        budget.spend()
        context, given = args[:leading], list(args[leading:])
        if given:
            _check(budget, name, given, kwargs)
        result = budget.made(work(*context, *given, **kwargs))
        if name == "string" and not isinstance(result, str):
            return budget.shown(result)
        return result

    return filtered


def bounded_test(budget: Budget, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The test `name`, counted."""

    @wraps(work)
    def tested(*args: Any, **kwargs: Any) -> Any:
        budget.spend()
        if name in _COMPARING:
            for value in args:
                budget.compared(value)
        return work(*args, **kwargs)

    return tested


def _check(budget: Budget, name: str, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    """Counts what a filter is given; raises TooMuchWork if its result would be too large."""
    value, further = given[0], (*given[1:], *kwargs.values())
    check_numbers(further)
    for argument in further:
        budget.walked(argument)
    if name not in _AT_ONCE or (name == "string" and not isinstance(value, str)):
        budget.walked(value)
    if name in _ORDERING and isinstance(value, Sized):
        budget.spend(len(value) // 2)
    position = _ATTRIBUTE.get(name, len(given))
    paths = [kwargs.get("attribute"), *given[position : position + 1]]
    if any(isinstance(path, str) and len(path) > 8 * SHORT for path in paths):
        raise TooMuchWork
    if name in _SLOW:
        characters = 8 * sum(map(budget.weight, (value, *further)))
        if characters > _SLOW_CHARACTERS + 8 * (1 + len(further)):
            raise TooMuchWork
        budget.spend(characters // NODES)
    special = _SPECIAL.get(name)
    if special is not None:
        special(budget, given, kwargs)


def _check_list(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    if isinstance(given[0], str):
        fits(4 * len(given[0]))
        budget.spend(len(given[0]) // NODES)


def _check_joined(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    if not isinstance(given[0], str | list | tuple | Mapping | MappingView | range):
        given[0] = list(budget.made(iter(given[0])))
    separator = kwargs.get("d", given[1] if len(given) > 1 else "")
    check_join(separator if isinstance(separator, str) else "", given[0])


def _check_replaced(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    old, new = [*given[1:3], *(kwargs[key] for key in ("old", "new") if key in kwargs), "", ""][:2]
    if not isinstance(given[0], str):
        given[0] = budget.shown(given[0])
    check_method(budget, given[0], "replace", (str(old), str(new)), {})


def _check_formatted(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    form = budget.shown(given[0])
    check_operator(budget, "%", form, dict(kwargs) or tuple(given[1:]))


def _check_indented(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    width = kwargs.get("width", given[1] if len(given) > 1 else 4)
    text = budget.shown(given[0])
    lines = 1 + len(text.splitlines())
    fits(len(text) + lines * (len(width) if isinstance(width, str) else int(width)))


def _check_rounded(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    for digits in (*given[1:2], *kwargs.values()):
        if isinstance(digits, int) and abs(digits) > SHORT:
            raise TooMuchWork


def _check_summed(budget: Budget, given: list[Any], kwargs: Mapping[str, Any]) -> None:
    """A sum of lists copies what it has so far for each of them."""
    start = kwargs.get("start", given[2] if len(given) > 2 else 0)
    if isinstance(start, int | float):
        return
    given[0] = list(budget.made(iter(given[0])))
    budget.spend(len(given[0]) * budget.weight(given[0]) // (CHARACTERS * NODES))


_SPECIAL: Final[dict[str, Callable[[Budget, list[Any], Mapping[str, Any]], None]]] = {
    "list": _check_list,
    "join": _check_joined,
    "replace": _check_replaced,
    "format": _check_formatted,
    "indent": _check_indented,
    "round": _check_rounded,
    "sum": _check_summed,
}
