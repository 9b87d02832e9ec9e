"""The functions of a request, and which of them the model may or must call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loraplex_gateway.errors import ApiError

MAX_FUNCTIONS: Final = 128

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_EMPTY: Final[Mapping[str, Any]] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call.

    Attributes:
        name: its name.
        description: what it does; "" if that is not said.
        parameters: JSON schema of its arguments, which are an object.
        strict: whether the arguments of every call have to be valid by the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of the arguments by their names; empty if the schema does not list them."""
        found = self.parameters.get("properties")
        return found if isinstance(found, Mapping) else {}

    def rendered(self) -> dict[str, Any]:
        """The function as the chat template gets it. Templates rely on all of these keys."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {"properties": {}, **self.parameters},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class FunctionChoice:
    """What `tool_choice` allows.

    Attributes:
        may: whether functions may be called.
        must: whether at least one has to be.
        names: the functions that count; None for all of the request.
        once: whether only one call is wanted.
    """

    may: bool = True
    must: bool = False
    names: frozenset[str] | None = None
    once: bool = False


def functions_of(tools: Sequence[Any]) -> tuple[Function, ...]:
    """The functions in a request's `tools`. Raises ApiError (400)."""
    if len(tools) > MAX_FUNCTIONS:
        raise _invalid("tools", f"are more than {MAX_FUNCTIONS}")
    found = tuple(_function(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [function.name for function in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise _invalid(f"tools[{i}].function.name", f"two functions are called {name}")
    return found


def _function(tool: Any, where: str) -> Function:
    if not isinstance(tool, Mapping):
        raise _invalid(where, "is not an object")
    kind = tool.get("type", "function")
    if kind != "function":
        raise _invalid(f"{where}.type", f"{str(kind)[:64]!r} is not supported; it must be function")
    given = tool.get("function")
    where = f"{where}.function"
    if not isinstance(given, Mapping):
        raise _invalid(where, "is not an object with a name")
    name, parameters = given.get("name"), given.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        text = "must be 1 to 64 letters, digits, underscores, dots or dashes"
        raise _invalid(f"{where}.name", text)
    description = given.get("description") or ""
    if not isinstance(description, str):
        raise _invalid(f"{where}.description", "is not a string")
    if not isinstance(given.get("strict") or False, bool):
        raise _invalid(f"{where}.strict", "is neither true nor false")
    return Function(
        name, description, _schema(parameters, f"{where}.parameters"), bool(given.get("strict"))
    )


def _schema(given: Any, where: str) -> Mapping[str, Any]:
    """The schema of the arguments; that of an object without members if none is given."""
    if not given:
        if given is not None and given != {}:
            raise _invalid(where, "is not a JSON schema")
        return _EMPTY
    if not isinstance(given, Mapping):
        raise _invalid(where, "is not a JSON schema")
    if "type" in given and given["type"] != "object":
        raise _invalid(f"{where}.type", 'must be "object", as arguments are one')
    if "properties" in given and not isinstance(given["properties"], Mapping):
        raise _invalid(f"{where}.properties", "is not an object")
    return given if "type" in given or "$ref" in given else {"type": "object", **given}


def choice_of(choice: Any, parallel: bool | None, functions: Sequence[Function]) -> FunctionChoice:
    """What `tool_choice` and `parallel_tool_calls` say. Raises ApiError (400)."""
    once = parallel is False
    match choice:
        case None | "auto":
            return FunctionChoice(once=once)
        case "none":
            return FunctionChoice(may=False)
        case "required":
            return FunctionChoice(must=True, once=once)
        case {"type": "function"}:
            given = choice.get("function", choice)  # the Responses API has the name outside
            name = given.get("name") if isinstance(given, Mapping) else None
            return FunctionChoice(must=True, names=_known([name], functions), once=True)
        case {"type": "allowed_tools"}:
            given = choice.get("allowed_tools", choice)
            return _allowed(given, once, functions)
    text = (
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
        'of the type "allowed_tools"'
    )
    raise _invalid("tool_choice", text)


def _allowed(given: Any, once: bool, functions: Sequence[Function]) -> FunctionChoice:
    mode = given.get("mode", "auto") if isinstance(given, Mapping) else None
    tools = given.get("tools") if isinstance(given, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise _invalid("tool_choice", 'needs a "mode" of auto or required, and a list of "tools"')
    names = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        names.append(function.get("name") if isinstance(function, Mapping) else None)
    return FunctionChoice(must=mode == "required", names=_known(names, functions), once=once)


def _known(names: Sequence[Any], functions: Sequence[Function]) -> frozenset[str]:
    known = {function.name for function in functions}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise _invalid("tool_choice", f"{str(name)[:64]!r} is not the name of a tool")
    return frozenset(names)


def _invalid(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", param=param, code="invalid_value")
