"""Descriptions of tools and calls of them, in the one form that chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplex_adapters.format.strict_json import loads, shown

from loraplex_training.data.problems import Dropped
from loraplex_training.data.shapes.values import check_strings, items, mapping, string


def tools_of(value: object, what: str) -> tuple[Mapping[str, Any], ...]:
    """Returns descriptions of tools as {"type": "function", "function": {…}}.

    Taken are a list, or a JSON string of one, with or without the outer object. Raises ValueError.
    """
    if isinstance(value, str) and not value.strip():
        return ()
    made = []
    for at, tool in enumerate(items(value, what, "tools")):
        where = f"{what}[{at}]"
        tool = mapping(tool, where)
        function = mapping(tool.get("function", tool), f"{where}.function")
        if "name" not in function:
            raise ValueError(f'{where} has no "name"')
        string(function["name"], f"{where}.name")
        check_strings(tool, where)
        made.append(
            {"type": "function", **tool, "function": function}
            if "function" in tool
            else {"type": "function", "function": _without_type(tool)}
        )
    return tuple(made)


def calls_of(value: object, what: str) -> list[dict[str, Any]]:
    """Returns calls as {"id", "type": "function", "function": {"name", "arguments": object}}.

    Raises ValueError, and Dropped for arguments that are no object.
    """
    return [
        call_of(call, f"{what}[{at}]") for at, call in enumerate(items(value, what, "tool calls"))
    ]


def call_of(value: object, what: str) -> dict[str, Any]:
    """Returns one call, from the form of `calls_of` or from {"name", "arguments"}."""
    call = mapping(value, what)
    function = mapping(call.get("function", call), f"{what}.function")
    if "name" not in function:
        raise ValueError(f'{what} has no "name"')
    name = string(function["name"], f"{what}.name")
    made: dict[str, Any] = {"type": "function"}
    if "id" in call:
        made = {"id": string(call["id"], f"{what}.id"), **made}
    arguments = function.get("arguments", function.get("parameters", {}))
    made["function"] = {"name": name, "arguments": _arguments(arguments, what)}
    check_strings(made, what)
    return made


def calls_in(text: str) -> list[dict[str, Any]] | None:
    """Returns the calls that a text spells out as JSON, and None if it does not."""
    try:
        value = loads(text.encode("utf-8", "surrogatepass"))
        calls = value if isinstance(value, list) else [value]
        if not calls or not all(isinstance(c, dict) and "name" in c for c in calls):
            return None
        return [call_of(call, "the call") for call in calls]
    except ValueError:
        return None


def _arguments(value: object, what: str) -> dict[str, Any]:
    try:
        return mapping(value, f"{what}.arguments")
    except ValueError as error:
        named = f" ({shown(value, 40)})" if isinstance(value, str) else ""
        raise Dropped(
            "has a tool call whose arguments are not a JSON object", f"{error}{named}"
        ) from None


def _without_type(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tool.items() if key != "type" or value != "function"}
