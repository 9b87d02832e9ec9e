"""Calls whose arguments stand in tags, one by one: Qwen3-Coder, GLM 4.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from loraplex_gateway.tools import grammar
from loraplex_gateway.tools.deltas import long_id
from loraplex_gateway.tools.formats.base import CallMarks, FunctionCall, written
from loraplex_gateway.tools.functions import Function
from loraplex_gateway.tools.grammar import CallForm
from loraplex_gateway.tools.source import Malformed, Source, Steps


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one family.

    Attributes:
        call: begins a call; one of the format's openers, unless the function's own tag is one.
        function: begins the name of the function; "" if it follows the opener.
        name_ends: what may end the name; a text of these that is also `key` or `end` stays unread.
        key, key_ends: around the name of an argument.
        value, value_ends: around its value.
        end, call_ends: end the function and the call.
    """

    call: str
    function: str
    name_ends: str
    key: str
    key_ends: str
    value: str
    value_ends: str
    end: str
    call_ends: str


QWEN3_CODER: Final = Tags(
    "<tool_call>",
    "<function=",
    ">",
    "<parameter=",
    ">",
    "\n",
    "\n</parameter>",
    "</function>",
    "</tool_call>",
)
GLM45: Final = Tags(
    "<tool_call>",
    "",
    "\n",
    "<arg_key>",
    "</arg_key>",
    "\n<arg_value>",
    "</arg_value>",
    "</tool_call>",
    "",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCalls:
    """Calls in `tags`. Values are text if the schema says so, otherwise JSON."""

    marks: CallMarks
    tags: Tags
    new_id: Callable[[], str] = long_id

    @property
    def form(self) -> CallForm:
        """See ToolFormat."""
        return self

    def rules(self, functions: Sequence[Function], many: bool) -> str:
        tags, lines = self.tags, [f"calls: {grammar.repeated(chr(10), many)}"]
        lines.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}")
        for i, function in enumerate(functions):
            first = "\n".join(part for part in (tags.call, tags.function) if part)
            needed = grammar.required(function)
            parts = [grammar.literal(f"{first}{function.name}{tags.name_ends}" + self._gap)]
            for j, name in enumerate(function.properties):
                parts.append(f"arg_{i}_{j}" + ("" if name in needed else "?"))
                lines += _argument(tags, function, name, f"arg_{i}_{j}")
            ends = "\n".join(part for part in (tags.end, tags.call_ends) if part)
            lines.append(f"call_{i}: {grammar.joined((*parts, grammar.literal(ends)))}")
        return "\n".join(lines) + "\n"

    @property
    def _gap(self) -> str:
        """What separates the name from the first argument, if the end of the name does not."""
        return "" if self.tags.name_ends == "\n" else "\n"

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        tags = self.tags
        yield from source.space()
        if tags.function and opener != tags.function:
            yield from _need(source, tags.function)
        name = yield from source.take(*functions)
        if not name:
            raise Malformed
        if tags.name_ends.strip():
            yield from _need(source, tags.name_ends)
        arguments: dict[str, Any] = {}
        while True:
            yield from source.space()
            mark = yield from source.take(tags.key, tags.end)
            if mark == tags.end:
                break
            if not mark:
                raise Malformed
            key, _ = yield from source.until(tags.key_ends)
            arguments[key.strip()] = _value(
                functions[name], key.strip(), (yield from self._written(source))
            )
        if tags.call_ends:
            yield from source.space()
            yield from source.take(tags.call_ends)
        return [written(name, arguments)]

    def _written(self, source: Source) -> Steps[str]:
        """The text of a value, without the line breaks that belong to the tags."""
        tags = self.tags
        if tags.value.strip():
            yield from source.space()
            yield from _need(source, tags.value.strip())
        else:
            yield from source.take(tags.value)
        text, _ = yield from source.until(tags.value_ends.strip())
        gap = tags.value_ends[: -len(tags.value_ends.strip())]
        return text.removesuffix(gap)


def _need(source: Source, text: str) -> Steps[None]:
    if not (yield from source.take(text)):
        raise Malformed


def _is_text(function: Function, name: str) -> bool:
    schema = function.properties.get(name)
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _value(function: Function, name: str, text: str) -> Any:
    """A value as its schema reads it; text that is no JSON stays text."""
    if _is_text(function, name):
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return text


def _argument(tags: Tags, function: Function, name: str, rule: str) -> list[str]:
    """Rules of Lark for one argument with its tags."""
    head = grammar.literal(f"{tags.key}{name}{tags.key_ends}{tags.value}")
    ends = grammar.literal(f"{tags.value_ends}\n")
    schema = grammar.value_schema(function, name)
    if not _is_text(function, name):
        return [f"{rule}: {head} {rule}_value {ends}", f"{rule}_value: {grammar.as_json(schema)}"]
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(allowed, list) and allowed and all(isinstance(each, str) for each in allowed):
        texts = " | ".join(grammar.literal(each) for each in allowed if each)
        return [f"{rule}: {head} ({texts}) {ends}"]
    return [f"{rule}: {head} {rule}_value", f"{rule}_value[lazy]: /(.|\\n)*/ {ends}"]
