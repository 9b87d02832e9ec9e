"""The formats by name, and which of them a chat template asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loraplex_gateway.tools.deltas import short_id
from loraplex_gateway.tools.formats.base import CallMarks, ToolFormat
from loraplex_gateway.tools.formats.json_calls import BareJson, MarkedJson, NamedJson
from loraplex_gateway.tools.formats.mistral import MistralCalls
from loraplex_gateway.tools.formats.pythonic import PythonCalls
from loraplex_gateway.tools.formats.tagged import GLM45, QWEN3_CODER, TaggedCalls
from loraplex_gateway.tools.grammar import Wire

_NAMED: Final = '{"name": "', '", "arguments": '
_CHATML: Final = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TOOL_NAMED: Final = '{"tool_name": "', '", "parameters": '

FORMATS: Final[Mapping[str, ToolFormat]] = {
    "hermes": MarkedJson(
        marks=CallMarks(("<tool_call>",), hidden=_CHATML),
        form=Wire(f"<tool_call>\n{_NAMED[0]}", _NAMED[1], closing="}\n</tool_call>", between="\n"),
        closers=("</tool_call>",),
    ),
    "llama3_json": BareJson(
        marks=CallMarks(
            ("<|python_tag|>",), at_start=True, hidden=("<|eom_id|>", "<|eot_id|>"), special=True
        ),
        form=Wire('{"name": "', '", "parameters": ', closing="}", between="; "),
    ),
    "llama3_pythonic": PythonCalls(
        marks=CallMarks(
            ("<|python_tag|>",), at_start=True, hidden=("<|eom_id|>", "<|eot_id|>"), special=True
        ),
        first="[",
        between=", ",
        last="]",
    ),
    "mistral": MistralCalls(
        marks=CallMarks(("[TOOL_CALLS]",), special=True),
        new_id=short_id,
        form=Wire(*_NAMED, closing="}", first="[", between=", ", last="]"),
    ),
    "mistral_args": MistralCalls(
        marks=CallMarks(("[TOOL_CALLS]",), special=True),
        new_id=short_id,
        form=Wire("[TOOL_CALLS]", "[ARGS]"),
    ),
    "granite": MarkedJson(
        marks=CallMarks(("<|tool_call|>",), special=True),
        form=Wire(*_NAMED, closing="}", first="[", between=", ", last="]"),
        closers=("<|/tool_call|>",),
    ),
    "phi4_mini": MarkedJson(
        marks=CallMarks(("functools", "<|tool_call|>"), special=True),
        form=Wire(*_NAMED, closing="}", first="functools[", between=", ", last="]"),
        closers=("<|/tool_call|>",),
    ),
    "command_r": MarkedJson(
        marks=CallMarks(("Action:",)),
        form=Wire(
            *_TOOL_NAMED, closing="}", first="Action: ```json\n[", between=", ", last="]\n```"
        ),
        fences=("```json", "```"),
        closers=("```",),
    ),
    "cohere2": MarkedJson(
        marks=CallMarks(
            ("<|START_ACTION|>",),
            hidden=(
                "<|START_THINKING|>",
                "<|END_THINKING|>",
                "<|START_RESPONSE|>",
                "<|END_RESPONSE|>",
                "<|END_OF_TURN_TOKEN|>",
            ),
            special=True,
        ),
        form=Wire(*_TOOL_NAMED, closing="}", first="[", between=", ", last="]"),
        closers=("<|END_ACTION|>",),
    ),
    "olmo3": PythonCalls(
        marks=CallMarks(("<function_calls>",), hidden=_CHATML),
        first="<function_calls>\n",
        between="\n",
        last="\n</function_calls>",
    ),
    "glm4": NamedJson(marks=CallMarks(at_start=True), form=Wire("", "\n", many=False)),
    "glm45": TaggedCalls(marks=CallMarks(("<tool_call>",)), tags=GLM45),
    "qwen3_coder": TaggedCalls(
        marks=CallMarks(("<tool_call>", "<function="), hidden=_CHATML), tags=QWEN3_CODER
    ),
}
"""All formats by the names that the setting `tool_format` takes."""

_SIGNS: Final = (
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm45", ("<arg_key>",)),
    ("hermes", ("<tool_call>",)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("cohere2", ("<|START_ACTION|>",)),
    ("command_r", ("Action:", "tool_name")),
    ("phi4_mini", ("functools[",)),
    ("granite", ("<|tool_call|>",)),
    ("olmo3", ("<function_calls>",)),
    ("llama3_pythonic", ("<|start_header_id|>", "func_name1(params_name1=")),
    ("llama3_json", ("<|start_header_id|>", '"parameters": ')),
    ("glm4", ("<|observation|>",)),
)
"""The texts of a template that all have to occur for a format; the first that fits counts."""


def detected(template: str) -> str:
    """The name of the format that a chat template has calls written in; "" if it is not known."""
    plain = template.replace('\\"', '"')
    for name, signs in _SIGNS:
        if all(sign in plain for sign in signs):
            return name
    return ""
