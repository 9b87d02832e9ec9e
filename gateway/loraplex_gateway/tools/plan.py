"""From a request's tools to what is asked of the server, and to the reader of its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from loraplex import ModelDescription

from loraplex_gateway.errors import ApiError
from loraplex_gateway.tools import grammar
from loraplex_gateway.tools.formats.base import ToolFormat
from loraplex_gateway.tools.formats.known import FORMATS, detected
from loraplex_gateway.tools.functions import Function, FunctionChoice, choice_of, functions_of
from loraplex_gateway.tools.grammar import CallForm, Wire
from loraplex_gateway.tools.reader import (
    DeltaSink,
    FreeReading,
    PlainReader,
    SteppedReader,
    TextReading,
    ToolReader,
    WireReading,
)

_FORMS: Final = ("json_schema", "json_object", "regex", "choices", "grammar")
"""The client's options that ask for a form of the answer."""


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How the tools of a request are treated.

    Attributes:
        rendered: the functions for the chat template; () if the model is not to know of them.
        calls: the format of calls.
        functions: the functions that may be called, by their names.
        once: whether at most one call is passed on.
        grammar: the grammar of the completion; "" if it may be any text.
        enforced: the form of calls, if the completion has to be calls or an answer by a schema.
        hidden: special tokens of the model that are not shown.
    """

    rendered: tuple[Mapping[str, Any], ...]
    calls: ToolFormat
    functions: Mapping[str, Function]
    once: bool
    grammar: str
    enforced: CallForm | None
    hidden: tuple[str, ...]

    @property
    def special_tokens(self) -> bool:
        """Whether the text is needed with its special tokens, which may announce calls."""
        return self.enforced is None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the client's `generate` and `stream`, in addition to those of the request."""
        found: dict[str, Any] = {"tools": self.rendered}
        if self.grammar:
            found["grammar"] = self.grammar
        if self.special_tokens:
            found["skip_special_tokens"] = False
        return found


def with_tools(
    options: Mapping[str, Any],
    model: ModelDescription,
    tools: Sequence[Any] | None,
    choice: Any = None,
    parallel: bool | None = None,
    tool_format: str = "",
) -> tuple[dict[str, Any], ToolPlan | None]:
    """The client's options of a request with what its tools add to them, and the plan.

    `options` may ask for a form of the answer. JSON can be asked for beside tools; other forms only
    if a call is required, so that there is no answer. Raises ApiError (400).
    """
    found = dict(options)
    forms = {name: found.pop(name) for name in _FORMS if found.get(name)}
    answer: Mapping[str, Any] | None = None
    if forms.get("json_object"):
        answer = {"type": "object"}
    elif tools and "json_schema" in forms:  # otherwise the server reads it
        answer = _schema(forms["json_schema"])
    planned = plan(model, tools, choice, parallel, tool_format=tool_format, answer=answer)
    if planned is None:
        return dict(options), None
    if forms and answer is None and planned.enforced is None:
        raise _refused(
            "tools", "beside tools, only JSON can be asked for as the form of the answer"
        )
    return {**found, **planned.options}, planned


def plan(
    model: ModelDescription,
    tools: Sequence[Any] | None,
    choice: Any = None,
    parallel: bool | None = None,
    *,
    tool_format: str = "",
    answer: Mapping[str, Any] | None = None,
) -> ToolPlan | None:
    """How the tools of a request are treated; None if the model is not to know of any.

    Args:
        model: the base model.
        tools, choice, parallel: `tools`, `tool_choice` and `parallel_tool_calls` of the request,
            whose functions are as in chat completions.
        tool_format: the name of the format of calls; "" finds it out from the chat template.
        answer: the JSON schema of an answer without calls, if the request has one.

    Raises ApiError (400).
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _refused("tool_choice", "there are no tools to choose from")
        return None
    functions = functions_of(tools)
    chosen = choice_of(choice, parallel, functions)
    if not chosen.may:
        return None
    calls = _format_of(model, tool_format)
    offered = [f for f in functions if chosen.names is None or f.name in chosen.names]
    begin = (model.bos_token,) if model.bos_token is not None else ()
    rules, form = _grammar(calls, offered, chosen, answer, model)
    return ToolPlan(
        rendered=tuple(function.rendered() for function in functions),
        calls=calls,
        functions={function.name: function for function in offered},
        once=chosen.once,
        grammar=rules,
        enforced=form,
        hidden=tuple(token.text for token in (*model.eos_tokens, *begin) if token.text),
    )


def reader(found: ToolPlan | None) -> ToolReader:
    """A reader for one completion of a request with this plan."""
    if found is None:
        return PlainReader()
    return SteppedReader(_reading(found), DeltaSink(found.calls.new_id, found.once))


def _reading(found: ToolPlan) -> TextReading:
    if isinstance(found.enforced, Wire):
        return WireReading(found.enforced, found.functions)
    hidden = found.hidden if found.special_tokens else ()
    return FreeReading(found.calls, found.functions, hidden)


def _schema(text: str) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _refused("response_format", f"is no JSON schema: {error}") from None
    if not isinstance(found, dict):
        raise _refused("response_format", "must be a JSON schema that is an object")
    return found


def _format_of(model: ModelDescription, name: str) -> ToolFormat:
    template = model.chat_template
    if template is None or not template.takes_tools:
        raise _refused(
            "tools",
            f"the chat template of {model.name} does not read tools; the server's operator can set "
            "one that does",
        )
    name = name or detected(template.text)
    if not name:
        known = ", ".join(FORMATS)
        raise _refused(
            "tools",
            f"it is not known how {model.name} writes calls of functions; the gateway's operator "
            f"can set tool_format to one of {known}",
        )
    return FORMATS[name]


def _grammar(
    calls: ToolFormat,
    functions: Sequence[Function],
    chosen: FunctionChoice,
    answer: Mapping[str, Any] | None,
    model: ModelDescription,
) -> tuple[str, CallForm | None]:
    """The grammar of the completion, and the form of its calls if it leaves no free text."""
    form = calls.form
    if chosen.must:
        return grammar.enforced(form.rules(functions, not chosen.once)), form
    if answer is not None:
        if answer.get("type", "object") != "object":
            raise _refused("response_format", "beside tools, the answer must be a JSON object")
        if isinstance(form, Wire) and form.begins.startswith("{"):  # as the answer does
            form = dataclasses.replace(form, first=calls.marks.openers[0] + form.first)
        return grammar.enforced(form.rules(functions, not chosen.once), answer), form
    is_strict = all(function.strict for function in functions) and model.has_structured_output
    marks = calls.marks
    if not is_strict or not isinstance(form, Wire) or marks.special or len(marks.openers) != 1:
        return "", None
    return grammar.triggered(form, marks.openers[0], functions, chosen.once), None


def _refused(param: str, text: str) -> ApiError:
    return ApiError(400, f"{param}: {text}", param=param, code="invalid_value")
