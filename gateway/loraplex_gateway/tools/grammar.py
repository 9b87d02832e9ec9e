"""Grammars, in llguidance's dialect of Lark, of calls and of answers that may be calls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from loraplex_gateway.errors import ApiError
from loraplex_gateway.tools.functions import Function

MAX_CALLS: Final = 16
"""Most calls of one answer whose form is enforced, so that it comes to an end."""

_SPACING: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""White space as chat templates write JSON. Free white space could go on without an end."""


class CallForm(Protocol):
    """How enforced calls are written."""

    def rules(self, functions: Sequence[Function], many: bool) -> str:
        """Rules of Lark, of which `calls` describes one call, or `many`."""


@dataclass(frozen=True, slots=True)
class Wire:
    """The exact text of enforced calls whose arguments are JSON.

    Attributes:
        before, after: what stands before and after the name of the function.
        closing: what follows the arguments.
        first, between, last: what stands before, between and after the calls.
        many: whether an answer can have several calls.
    """

    before: str
    after: str
    closing: str = ""
    first: str = ""
    between: str = ""
    last: str = ""
    many: bool = True

    @property
    def begins(self) -> str:
        """What stands before the name of the first function."""
        return f"{self.first}{self.before}"

    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""
        return f"{self.before}{name}{self.after}"

    def rules(self, functions: Sequence[Function], many: bool) -> str:
        """See CallForm."""
        calls = repeated(self.between, many and self.many)
        lines = [f"calls: {joined((literal(self.first), calls, literal(self.last)))}"]
        lines.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}")
        for i, function in enumerate(functions):
            parts = (literal(self.head(function.name)), f"args_{i}", literal(self.closing))
            lines.append(f"call_{i}: {joined(parts)}")
            lines.append(f"args_{i}: {as_json(arguments_schema(function))}")
        return "\n".join(lines) + "\n"


def enforced(rules: str, answer: Mapping[str, Any] | None = None) -> str:
    """The grammar of a completion that is calls or, if `answer` is a JSON schema, JSON by it."""
    if answer is None:
        return f"start: calls\n{rules}"
    return f"start: calls | answer\nanswer: {as_json(answer)}\n{rules}"


def triggered(wire: Wire, opener: str, functions: Sequence[Function], once: bool) -> str:
    """The grammar of any text in which `opener` begins calls; "" if the wire has no opener."""
    if wire.first.startswith(opener):
        rest = dataclasses.replace(wire, first=wire.first.removeprefix(opener))
        rules = rest.rules(functions, not once)
    elif wire.before.startswith(opener):
        rest = dataclasses.replace(wire, before=wire.before.removeprefix(opener))
        rules = rest.rules(functions, False)
    else:
        return ""
    times = "?" if once else "*"
    head = f"head[lazy]: TEXT {literal(opener)}"
    return f"start: (head calls){times} TEXT\nTEXT: /(.|\\n)*/\n{head}\n{rules}"


def repeated(between: str, many: bool) -> str:
    """One `call`, or up to MAX_CALLS with a text between them."""
    if not many:
        return "call"
    return f"call ({joined((literal(between), 'call'))}){{0,{MAX_CALLS - 1}}}"


def literal(text: str) -> str:
    """A text in Lark; "" for no text."""
    return _written(text) if text else ""


def joined(parts: Iterable[str]) -> str:
    """Parts of a rule after each other, without those that are empty."""
    return " ".join(part for part in parts if part)


def as_json(schema: Mapping[str, Any]) -> str:
    """JSON by a schema, in Lark. Raises ApiError (400)."""
    try:
        return "%json " + _written({**schema, "x-guidance": _SPACING})
    except RecursionError:
        text = "tools: a schema has too many lists and objects within each other"
        raise ApiError(400, text, param="tools", code="invalid_value") from None


def _written(value: Any) -> str:
    """A value as JSON, of which the texts are also those of Lark."""
    text = json.dumps(value, ensure_ascii=False)
    # "::=", which defines a rule in grammars of llama.cpp, can only be within a text here.
    return text.replace("::=", ":\\u003a=")


def arguments_schema(function: Function) -> Mapping[str, Any]:
    """The schema of a function's arguments; without one, there are none."""
    parameters = function.parameters
    if parameters.get("properties") or set(parameters) - {"type", "properties"}:
        return parameters
    return {**parameters, "additionalProperties": False}


def value_schema(function: Function, name: str) -> Mapping[str, Any]:
    """The schema of one argument, with the definitions to which it may refer."""
    schema = function.properties[name]
    if not isinstance(schema, Mapping):
        return {}
    definitions = {
        key: function.parameters[key]
        for key in ("$defs", "definitions")
        if key in function.parameters
    }
    return {**schema, **definitions}


def required(function: Function) -> list[str]:
    """The arguments that every call has, in the order of the schema; then come the others."""
    names = function.parameters.get("required")
    given = set(names) if isinstance(names, list) else set()
    return [name for name in function.properties if name in given]
