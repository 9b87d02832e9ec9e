"""Structured output: the many ways in which clients ask for it, and the one option that results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from loraplex_gateway.wire.bodies import invalid

if TYPE_CHECKING:
    from loraplex_gateway.generation.parameters import SamplingFields

Json = str | dict[str, Any]

PARAMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "structured_output.json_schema": "response_format",
        "structured_output.json_object": "response_format",
        "structured_output.regex": "structured_outputs.regex",
        "structured_output.choices.texts": "structured_outputs.choice",
        "structured_output.choices": "structured_outputs.choice",
        "structured_output.grammar": "structured_outputs.grammar",
        "structured_output": "response_format",
        "json_schema": "response_format",
        "choices": "structured_outputs.choice",
    }
)
"""Fields of the server's request, and those of the HTTP request that usually set them."""


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The schema of a response format, with its name."""

    schema: Json | None = None
    name: str | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way. `schema` with the type `json_object` is what several other servers take."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: Json | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's way: exactly one of the forms."""

    json: Json | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_fallback: bool | None = None  # of other back ends: there is one here


class TextGrammar(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The way of Text Generation Inference."""

    type: Literal["json", "regex", "json_object"]
    value: Json


def options(fields: SamplingFields) -> dict[str, Any]:
    """The client's option for the form of the answer; empty if any text will do.

    Raises ApiError (400) if several forms are asked for.
    """
    found = [form for form in _forms(fields) if _is_set(form[2])]
    if not found:
        if fields.structured_outputs is not None:
            forms = "json, json_object, regex, choice and grammar"
            raise invalid("structured_outputs", f"must have one of {forms}")
        return {}
    if len(found) > 1:
        names = " and ".join(sorted({param for param, _, _ in found}))
        raise invalid(found[1][0], f"only one form of the answer can be asked for, not {names}")
    param, option, value = found[0]
    return {option: _text(param, value) if option == "json_schema" else value}


def params(fields: SamplingFields) -> dict[str, str]:
    """The server's fields for the form of the answer, and the request's field that set them."""
    asked = [(param, option) for param, option, value in _forms(fields) if _is_set(value)]
    if len(asked) != 1:
        return {}
    ((param, option),) = asked
    inner = {f"structured_output.{option}{rest}": param for rest in (".texts", "")}
    return {**inner, "structured_output": param, option: param}


def schema_text(param: str, schema: Json) -> str:
    """The text of a JSON schema given as a value or as its text. Raises ApiError (400)."""
    return _text(param, schema)


Form = tuple[str, str, Any]
"""The field of the request, the client's option, and its value."""


def _forms(fields: SamplingFields) -> Iterator[Form]:
    """Every form that a request could ask for; None and False ask for nothing."""
    yield from _response_format(fields.response_format)
    given = fields.structured_outputs
    if given is not None:
        yield "structured_outputs.json", "json_schema", given.json
        yield "structured_outputs.json_object", "json_object", given.json_object
        yield "structured_outputs.regex", "regex", given.regex
        yield "structured_outputs.choice", "choices", given.choice
        yield "structured_outputs.grammar", "grammar", given.grammar
    yield "guided_json", "json_schema", fields.guided_json
    yield "guided_json_object", "json_object", fields.guided_json_object
    yield "guided_regex", "regex", fields.guided_regex
    yield "guided_choice", "choices", fields.guided_choice
    yield "guided_grammar", "grammar", fields.guided_grammar
    yield "json_schema", "json_schema", fields.json_schema
    yield "regex", "regex", fields.regex
    yield "ebnf", "grammar", fields.ebnf
    match fields.grammar:
        case str() as text:
            yield "grammar", "grammar", text
        case TextGrammar(type="regex", value=value):
            if not isinstance(value, str):
                raise invalid("grammar.value", "must be a regular expression")
            yield "grammar.value", "regex", value
        case TextGrammar(value=value):
            yield "grammar.value", "json_schema", value


def _response_format(given: ResponseFormat | None) -> Iterator[Form]:
    if given is None:
        return
    if given.type != "json_schema" and given.json_schema is not None:
        raise invalid("response_format.json_schema", f"has no meaning with the type {given.type}")
    if given.type == "text":
        if given.schema is not None:
            raise invalid("response_format.schema", "has no meaning with the type text")
        return
    if given.type == "json_object":
        if given.schema is None:
            yield "response_format", "json_object", True
        else:
            yield "response_format.schema", "json_schema", given.schema
        return
    schema = given.json_schema.schema if given.json_schema is not None else given.schema
    if schema is None:
        raise invalid("response_format.json_schema.schema", "is missing")
    yield "response_format", "json_schema", schema


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _text(param: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise invalid(param, f"is no JSON schema: {error}") from None
