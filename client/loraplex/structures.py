"""Options for structured output: what the text of a completion must be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from loraplex.errors import invalid
from loraplex.v1 import generation_pb2


class StructureOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream` for structured output; at most one of them.

    None means any text, like leaving it out.
    """

    json_schema: Mapping[str, Any] | bool | str | None  # a JSON schema, or the text of one
    json_object: bool | None  # true: any JSON object
    regex: str | None  # an expression in the syntax of Rust's regex crate; it matches all of it
    choices: Iterable[str] | None  # the completion is one of these texts
    grammar: str | None  # a grammar in the syntax of Lark or llama.cpp (GBNF)


def structured_output(options: Mapping[str, Any]) -> generation_pb2.StructuredOutput | None:
    """Returns what `options` ask for, of which only those of StructureOptions are looked at.

    None if they ask for nothing. Raises InvalidRequest.
    """
    given = {
        name: value
        for name in StructureOptions.__annotations__
        if (value := options.get(name)) is not None
    }
    if given.get("json_object") is False:
        del given["json_object"]
    if not given:
        return None
    if len(given) > 1:
        raise invalid("structured_output", f"give only one of {' and '.join(given)}")
    ((name, value),) = given.items()
    if name == "json_schema":
        value = _schema(value)
    elif name == "choices":
        value = _choices(value)
    try:
        return generation_pb2.StructuredOutput(**{name: value})
    except (TypeError, ValueError) as error:
        raise invalid(f"structured_output.{name}", str(error)) from None


def _schema(value: object) -> str:
    if isinstance(value, str):
        return value
    where = "structured_output.json_schema"
    if not isinstance(value, Mapping | bool):
        raise invalid(where, "must be a JSON schema: a mapping, or the text of one")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(where, f"cannot be written as JSON: {error}") from None


def _choices(value: object) -> generation_pb2.Choices:
    where = "structured_output.choices"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise invalid(where, "must be a list of texts")
    try:
        return generation_pb2.Choices(texts=value)
    except (TypeError, ValueError) as error:
        raise invalid(where, str(error)) from None
