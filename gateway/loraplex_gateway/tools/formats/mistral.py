"""Calls of Mistral's models: after `[TOOL_CALLS]` a list in JSON, or a name and its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

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

ARGUMENTS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"

_ID: Final = re.compile(r"[A-Za-z0-9_-]{0,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralCalls:
    """All ways that Mistral's models have had, one of which enforced calls take.

    [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}, ...]
    [TOOL_CALLS]name{...}
    [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}
    """

    marks: CallMarks
    form: Wire
    new_id: Callable[[], str] = long_id

    def read(
        self, source: Source, opener: str, functions: Mapping[str, Function]
    ) -> Steps[list[FunctionCall]]:
        yield from source.space()
        if (yield from source.peek()) in ("[", "{"):
            return json_calls((yield from source.json()), functions)
        name = yield from source.take(*functions)
        yield from source.space()
        if not name:
            raise Malformed
        mark = yield from source.take(CALL_ID, ARGUMENTS)
        if mark == CALL_ID:
            call_id, _ = yield from source.until(ARGUMENTS)
            if not _ID.fullmatch(call_id.strip()):
                raise Malformed
        yield from source.space()
        text = yield from source.json()
        return [FunctionCall(name, object_text(text.encode()))]
