"""Calls are found in text wherever it is divided, and no text is lost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from gateway.tool_texts import (
    ARGUMENTS,
    BARE,
    JSON,
    ONE_CALL,
    deltas,
    free_reader,
    read_freely,
    taken,
    texts,
    wire_reader,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_gateway.tools.deltas import CallDelta, TextDelta
from loraplex_gateway.tools.formats.known import FORMATS
from loraplex_gateway.tools.grammar import Wire

NAMES = sorted(FORMATS)
MARKED = [name for name in NAMES if name not in BARE]

FRAGMENTS = [
    *ONE_CALL.values(),
    *(text[: len(text) // 2] for text in ONE_CALL.values()),
    *(opener for each in FORMATS.values() for opener in each.marks.openers),
    *(hidden for each in FORMATS.values() for hidden in each.marks.hidden),
    "</tool_call>",
    "<",
    "{",
    '"',
    "\\",
    "]",
    ";",
    "[CALL_ID]",
    "[ARGS]",
    "weather",
    "time",
    '{"name": "time"}',
    '{"name": "nobody", "arguments": {}}',
    '{"name": "weather", "arguments": 3}',
    "time()",
    "x = 1",
    " \n",
    "\u00a0",
    "日本 😀",
    "plain text",
]


@st.composite
def divided(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and the pieces in which it arrives."""
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=6)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(case=divided())
def test_the_pieces_of_a_text_do_not_matter(name: str, case: tuple[str, list[str]]) -> None:
    text, pieces = case
    assert read_freely(name, *pieces) == read_freely(name, text)
    assert read_freely(name, *text) == read_freely(name, text)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(FORMATS[n].form, Wire)])
@settings(deadline=None, max_examples=60)
@given(case=divided())
def test_nor_do_they_if_calls_are_enforced(name: str, case: tuple[str, list[str]]) -> None:
    text, pieces = case
    whole = taken(wire_reader(name), text)
    assert taken(wire_reader(name), *pieces) == whole
    if not whole.calls:
        assert whole.shown == text


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(case=divided())
def test_text_without_a_call_is_shown_as_it_is(name: str, case: tuple[str, list[str]]) -> None:
    text, pieces = case
    found = read_freely(name, *pieces)
    if found.calls:
        return
    for hidden in FORMATS[name].marks.hidden:
        text = text.replace(hidden, "")
    assert found.shown == text


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_read_as_the_model_meant_it(name: str) -> None:
    found = read_freely(name, *ONE_CALL[name])
    assert found.shown == ""
    ((function, arguments),) = found.calls
    assert function == "weather"
    assert json.loads(arguments) == ARGUMENTS


@pytest.mark.parametrize("name", MARKED)
@settings(deadline=None, max_examples=50)
@given(
    before=st.text("ab \n日<[A", max_size=8),
    after=st.text("ab \n日", max_size=8),
    size=st.integers(1, 9),
)
def test_text_around_a_call_stays(name: str, before: str, after: str, size: int) -> None:
    text = before + ONE_CALL[name] + after
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = read_freely(name, *pieces)
    assert len(found.calls) == 1
    assert found.shown == before.rstrip() + after.lstrip().rstrip() + _end(after)


def _end(after: str) -> str:
    return after[len(after.rstrip()) :] if after.strip() else ""


@pytest.mark.parametrize("name", NAMES)
def test_each_part_of_a_call_that_is_cut_off_is_shown(name: str) -> None:
    text = ONE_CALL[name]
    for size in range(1, len(text)):
        found = read_freely(name, text[:size])
        if not found.calls:
            assert found.shown == text[:size]
        else:  # the call was whole, and only some of its closing mark is missing
            assert json.loads(found.calls[0][1]) == ARGUMENTS
            assert text[:size].endswith(found.shown)
            assert "weather" not in found.shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "a"}\n</tool_call>'),
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>weather(city=1)</tool_call>"),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("hermes", "<tool_call>" + "[" * 5000),
        ("hermes", '<tool_call>{"name": ' + "[" * 200 + "]" * 200 + "}"),
        ("mistral", "[TOOL_CALLS]nobody{}"),
        ("mistral", "[TOOL_CALLS]weather[CALL_ID]not an id![ARGS]{}"),
        ("phi4_mini", "functools.partial is a function"),
        ("command_r", "Action: I go home"),
        ("llama3_json", '{"answer": 42}'),
        ("llama3_json", '["a list"]'),
        ("llama3_pythonic", "[1, 2, 3]"),
        ("llama3_pythonic", "[weather('Berlin')]"),
        ("llama3_pythonic", "[weather(city=open('/etc/passwd'))]"),
        ("llama3_pythonic", "[weather(city=1e999)]"),
        ("llama3_pythonic", "[weather(city='\\ud800')]"),
        ("llama3_pythonic", "[weather(**{'city': 1})]"),
        ("llama3_pythonic", "[weather(city=" + "(" * 250 + ")" * 250 + ")]"),
        ("olmo3", "<function_calls>\nimport os\n</function_calls>"),
        ("olmo3", "<function_calls>\n</function_calls>"),
        ("glm4", "weather is nice"),
        ("glm45", "<tool_call>weather\n<arg_key>city</arg_value></tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=nobody>\n</function>\n</tool_call>"),
    ],
)
def test_what_is_no_call_is_shown(name: str, text: str) -> None:
    found = read_freely(name, text)
    assert found.shown == text
    assert not found.calls


def test_a_call_after_one_that_is_malformed_is_found() -> None:
    found = read_freely("hermes", "<tool_call>oops", ONE_CALL["hermes"])
    assert found.shown == "<tool_call>oops"
    assert found.calls == [("weather", JSON)]


def test_several_calls_have_indices_and_ids_of_their_own() -> None:
    two = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}}}, {{"name": "time"}}]'
    found = [d for d in deltas(free_reader("mistral"), *two) if isinstance(d, CallDelta)]
    assert [(d.index, d.name, d.arguments) for d in found] == [
        (0, "weather", ""),
        (0, "", JSON),
        (1, "time", ""),
        (1, "", "{}"),
    ]
    ids = [d.id for d in found if d.name]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", ONE_CALL["hermes"] + "\n" + ONE_CALL["hermes"]),
        ("llama3_json", ONE_CALL["llama3_json"] + "; " + ONE_CALL["llama3_json"]),
        ("mistral_args", ONE_CALL["mistral_args"] * 2),
        ("mistral", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{JSON}[TOOL_CALLS]weather{JSON}"),
        ("llama3_pythonic", "[weather(city='a'), weather(city=\"b\", days=[])]"),
        ("olmo3", "<function_calls>\nweather(city='a')\nweather(city='b')\n</function_calls>"),
        ("qwen3_coder", ONE_CALL["qwen3_coder"] * 2),
        ("qwen3_coder", ONE_CALL["qwen3_coder"].replace("<tool_call>\n", "")),
        ("glm45", ONE_CALL["glm45"] + "\n" + ONE_CALL["glm45"]),
    ],
)
def test_calls_that_follow_each_other(name: str, text: str) -> None:
    found = read_freely(name, *text)
    assert found.shown == ""
    assert [call[0] for call in found.calls] == ["weather"] * (1 + (text.count("weather") > 1))
    if text.count("weather") > 1:
        assert taken(free_reader(name, once=True), text).calls == found.calls[:1]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true", True),
        ("None", None),
        ("null", None),
        ("-1.5", -1.5),
        ("'it\\'s'", "it's"),
        ("('a', ['b'])", ["a", ["b"]]),
        ("{'k': {'x': False}}", {"k": {"x": False}}),
        ("'[x](y)'", "[x](y)"),
    ],
)
def test_arguments_in_python(written: str, meant: object) -> None:
    ((_, arguments),) = read_freely("llama3_pythonic", *f"[weather(city={written})]").calls
    assert json.loads(arguments) == {"city": meant}


def test_arguments_in_tags_are_text_where_the_schema_says_so() -> None:
    text = (
        "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n"
        "<parameter=days>\n[3]\n</parameter>\n<parameter=note>\nno JSON\n\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    ((_, arguments),) = read_freely("qwen3_coder", *text).calls
    assert json.loads(arguments) == {"city": "12", "days": [3], "note": "no JSON\n"}


def test_arguments_that_are_json_within_a_string() -> None:
    text = '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"a\\"}"}</tool_call>'
    assert read_freely("hermes", text).calls == [("weather", '{"city": "a"}')]


def test_arguments_are_passed_on_letter_for_letter() -> None:
    arguments = '{"city":  "\\u00e9",\n "n": 1.50, "big": 123456789012345678901234567890}'
    text = f'<tool_call>{{"name": "weather", "arguments": {arguments}}}</tool_call>'
    assert read_freely("hermes", text).calls == [("weather", arguments)]


def test_marks_that_are_not_shown() -> None:
    text = (
        "<|START_THINKING|>I look<|END_THINKING|>" + ONE_CALL["cohere2"] + "<|END_OF_TURN_TOKEN|>"
    )
    found = read_freely("cohere2", *text)
    assert found.shown == "I look"
    assert found.calls == [("weather", JSON)]


def test_text_is_passed_on_as_it_comes() -> None:
    reader = free_reader("hermes")
    assert texts(reader.feed("Let me")) == ["Let me"]
    assert texts(reader.feed(" see <tool")) == [" see"]
    assert texts(reader.feed("box>")) == [" <toolbox>"]
    assert texts(reader.feed(" ")) == []
    assert texts(reader.end()) == [" "]


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(FORMATS[n].form, Wire)])
def test_enforced_arguments_are_passed_on_as_they_come(name: str) -> None:
    form = FORMATS[name].form
    assert isinstance(form, Wire)
    reader = wire_reader(name)
    first = reader.feed(form.first + form.head("weather") + '{"city": "Be')
    assert [(d.name, d.arguments) for d in first if isinstance(d, CallDelta)] == [
        ("weather", ""),
        ("", '{"city": "Be'),
    ]
    second = reader.feed('rlin"}' + form.closing)
    assert second == [CallDelta(0, 'rlin"}')]
    if form.many:
        third = reader.feed(form.between + form.head("time") + "{}" + form.closing)
        assert [(d.index, d.name, d.arguments) for d in third if isinstance(d, CallDelta)] == [
            (1, "time", ""),
            (1, "", "{}"),
        ]
    assert reader.feed(form.last) + reader.end() == []
    assert reader.called


def test_an_enforced_call_that_is_cut_off_keeps_its_arguments() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Berl\\'
    reader = wire_reader("hermes")
    found = taken(reader, *text)
    assert found.calls == [("weather", '{"city": "Berl\\')]
    assert (found.shown, reader.is_open) == ("", True)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(FORMATS[n].form, Wire)])
def test_white_space_after_an_enforced_call_is_not_shown(name: str) -> None:
    form = FORMATS[name].form
    assert isinstance(form, Wire)
    text = form.first + form.head("weather") + "{}" + form.closing
    for rest, shown in (("\n", ""), (" \n ", ""), (" \n and", "and"), ("and \n", "and \n")):
        for parts in ((text + rest,), (*text, *rest)):
            reader = wire_reader(name)
            found = taken(reader, *parts)
            assert (found.calls, found.shown) == ([("weather", "{}")], shown), (rest, parts)
            assert not reader.is_open


def test_an_answer_in_place_of_enforced_calls_is_shown() -> None:
    reader = wire_reader("hermes")
    assert deltas(reader, '{"ans', 'wer": 1}') == [TextDelta('{"ans'), TextDelta('wer": 1}')]
    assert not reader.called
