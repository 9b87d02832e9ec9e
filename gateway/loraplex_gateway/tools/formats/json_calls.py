"""Calls that are JSON objects: Hermes, Qwen, SmolLM3, Granite, Phi, Cohere, Llama."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraplex_gateway.tools.deltas import long_id
from loraplex_gateway.tools.formats.base import (
    CallMarks,
    FunctionCall,
    json_calls,
    object_text,
)
from loraplex_gateway.tools.functions import Function
from loraplex_gateway.tools.grammar import Wire
from loraplex_gateway.tools.source import Malformed, Source, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedJson:
    """An object or a list of objects after an opener.

    Attributes:
        form: the text of enforced calls.
        fences: texts one of which may stand between the opener and the JSON.
        closers: texts one of which may follow the JSON.
    """

    marks: CallMarks
    form: Wire
    new_id: Callable[[], str] = long_id
    fences: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        yield from source.space()
        if self.fences and (yield from source.take(*self.fences)):
            yield from source.space()
        calls = json_calls((yield from source.json()), functions)
        yield from source.space()
        yield from source.take(*self.closers)
        return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class BareJson:
    """Objects at the beginning of the answer, or after an opener, with a separator between them.

    Attributes:
        form: the text of enforced calls.
        separators: texts one of which may stand between two objects.
    """

    marks: CallMarks
    form: Wire
    new_id: Callable[[], str] = long_id
    separators: tuple[str, ...] = (";", ",")

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        yield from source.space()
        calls = json_calls((yield from source.json()), functions)
        while True:
            end = source.at
            yield from source.space()
            yield from source.take(*self.separators)
            yield from source.space()
            if (yield from source.peek()) != "{":
                source.at = end
                return calls
            try:
                calls += json_calls((yield from source.json()), functions)
            except Malformed:
                source.at = end
                return calls


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedJson:
    """The name of a function on a line of its own at the beginning, then an object: GLM 4."""

    marks: CallMarks
    form: Wire
    new_id: Callable[[], str] = long_id

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        yield from source.space()
        line = yield from source.take(*(f"{name}\n" for name in functions))
        if not line:
            raise Malformed
        yield from source.space()
        text = yield from source.json()
        return [FunctionCall(line.strip(), object_text(text.encode()))]
