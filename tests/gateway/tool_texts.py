"""Functions for tests, and how each format writes calls of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from loraplex_gateway.tools.deltas import TextDelta, ToolDelta, joined
from loraplex_gateway.tools.formats.known import FORMATS
from loraplex_gateway.tools.functions import functions_of
from loraplex_gateway.tools.reader import DeltaSink, FreeReading, SteppedReader, WireReading

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
FUNCTIONS = {function.name: function for function in functions_of([WEATHER, TIME])}

ARGUMENTS = {"city": 'Köln "1"', "days": [1, 2]}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)

ONE_CALL = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {JSON}}}',
    "llama3_pythonic": "[weather(city='Köln \"1\"', days=[1, 2])]",
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}, "id": "abcdefghi"}}]',
    "mistral_args": f"[TOOL_CALLS]weather[ARGS]{JSON}",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {JSON}}}]',
    "phi4_mini": f'functools[{{"name": "weather", "arguments": {JSON}}}]',
    "command_r": f'Action: ```json\n[\n{{"tool_name": "weather", "parameters": {JSON}}}\n]\n```',
    "cohere2": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", '
    f'"parameters": {JSON}}}\n]<|END_ACTION|>',
    "olmo3": "<function_calls>\nweather(city='Köln \"1\"', days=[1, 2])\n</function_calls>",
    "glm4": f"weather\n{JSON}",
    "glm45": '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln "1"</arg_value>\n'
    "<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>",
    "qwen3_coder": '<tool_call>\n<function=weather>\n<parameter=city>\nKöln "1"\n</parameter>\n'
    "<parameter=days>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
}
"""A call of `weather` with `ARGUMENTS` as models of each format write it."""

BARE = frozenset(name for name, each in FORMATS.items() if each.marks.at_start)
"""Formats whose calls need no opener, but stand at the beginning."""


@dataclass(frozen=True)
class Taken:
    """What a reader made of a text: what is shown, and (name, arguments) of the calls."""

    shown: str
    calls: list[tuple[str, str]]


def free_reader(name: str, once: bool = False) -> SteppedReader:
    calls = FORMATS[name]
    return SteppedReader(FreeReading(calls, FUNCTIONS), DeltaSink(calls.new_id, once))


def wire_reader(name: str, once: bool = False) -> SteppedReader:
    calls = FORMATS[name]
    return SteppedReader(WireReading(calls.form, FUNCTIONS), DeltaSink(calls.new_id, once))


def deltas(reader: SteppedReader, *pieces: str) -> list[ToolDelta]:
    found = [delta for piece in pieces for delta in reader.feed(piece)]
    return found + reader.end()


def taken(reader: SteppedReader, *pieces: str) -> Taken:
    text, calls = joined(deltas(reader, *pieces))
    return Taken(text, [(call.name, call.arguments) for call in calls])


def read_freely(name: str, *pieces: str) -> Taken:
    return taken(free_reader(name), *pieces)


def texts(found: list[ToolDelta]) -> list[str]:
    return [delta.text for delta in found if isinstance(delta, TextDelta)]
