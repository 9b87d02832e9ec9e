"""Calls in Python's syntax: OLMo 3, and Llama 3.2 if its template asks for it."""

from __future__ import annotations

import ast
import keyword
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraplex_gateway.errors import ApiError
from loraplex_gateway.tools import grammar
from loraplex_gateway.tools.deltas import long_id
from loraplex_gateway.tools.formats.base import CallMarks, FunctionCall, written
from loraplex_gateway.tools.functions import Function
from loraplex_gateway.tools.grammar import CallForm
from loraplex_gateway.tools.source import Malformed, Source, Steps

MAX_CHARACTERS: Final = 1 << 16
"""Longest text that is parsed as Python."""

_WORDS: Final = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonCalls:
    """`name(key=value, ...)`, several in a list or on lines of their own.

    Attributes:
        first, between, last: what stands around and between the calls.
    """

    marks: CallMarks
    first: str
    between: str
    last: str
    new_id: Callable[[], str] = long_id

    @property
    def form(self) -> CallForm:
        """See ToolFormat."""
        return self

    def rules(self, functions: Sequence[Function], many: bool) -> str:
        around = grammar.literal(self.first), grammar.literal(self.last)
        lines = [f"calls: {around[0]} {grammar.repeated(self.between, many)} {around[1]}"]
        lines.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}")
        for i, function in enumerate(functions):
            _require_names(function)
            lines.append(f'call_{i}: "{function.name}(" args_{i} ")"')
            lines += _arguments(function, f"args_{i}")
        return "\n".join(lines) + "\n"

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        yield from source.space()
        if opener:
            text, _ = yield from source.until(self.last.strip())
            return _calls(text.strip().split("\n"), functions)
        if (yield from source.peek()) != "[":
            raise Malformed
        return _calls([(yield from source.bracketed())], functions)


def _calls(lines: Sequence[str], functions: Mapping[str, Function]) -> list[FunctionCall]:
    """The calls in expressions of Python, which are parsed and not run. Raises Malformed."""
    text = "\n".join(line.strip() for line in lines)
    if len(text) > MAX_CHARACTERS:
        raise Malformed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            body = ast.parse(text).body
        found: list[ast.expr] = []
        for statement in body:
            if not isinstance(statement, ast.Expr):
                raise Malformed
            value = statement.value
            found += value.elts if isinstance(value, ast.List) else [value]
        calls = [_call(each, functions) for each in found]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise Malformed from None
    if not calls:
        raise Malformed
    return calls


def _call(node: ast.expr, functions: Mapping[str, Function]) -> FunctionCall:
    if not isinstance(node, ast.Call) or node.args:
        raise Malformed
    name = ast.unparse(node.func)
    if name not in functions or any(each.arg is None for each in node.keywords):
        raise Malformed
    arguments = {str(each.arg): _value(each.value) for each in node.keywords}
    return written(name, arguments)


def _value(node: ast.expr) -> Any:
    """A literal of Python, in which the words of JSON count, too."""
    match node:
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(key) if key is not None else None for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise Malformed
            return {name: _value(value) for name, value in zip(names, values, strict=True)}
    found = ast.literal_eval(node)
    if found is not None and not isinstance(found, str | int | float | bool):
        raise Malformed
    return found


def _require_names(function: Function) -> None:
    """Raises ApiError (400) if a name of the function cannot be written in Python."""
    for name in (*function.name.split("."), *function.properties):
        if not name.isidentifier() or keyword.iskeyword(name):
            text = (
                f"tool_choice: calls of {function.name} cannot be enforced, since the model writes "
                f"calls in Python's syntax, in which {name[:64]!r} is no name"
            )
            raise ApiError(400, text, param="tool_choice", code="invalid_value")


def _arguments(function: Function, rule: str) -> list[str]:
    """Rules of Lark for arguments by name: the required ones, then any of the others in order."""
    needed = grammar.required(function)
    names = [*needed, *(name for name in function.properties if name not in needed)]
    lines = []
    for i, name in enumerate(names):
        lines.append(f'{rule}_{i}: "{name}=" {rule}_{i}_value')
        lines.append(f"{rule}_{i}_value: {grammar.as_json(grammar.value_schema(function, name))}")
    rest = [f'(", " {rule}_{i})?' for i in range(len(names))]
    count = len(needed)
    if count:
        first = ' ", " '.join(f"{rule}_{i}" for i in range(count))
        return [f"{rule}: {' '.join((first, *rest[count:]))}", *lines]
    starts = [" ".join((f"{rule}_{i}", *rest[i + 1 :])) for i in range(len(names))]
    return [f"{rule}: ({' | '.join(starts)})?" if starts else f'{rule}: ""', *lines]
