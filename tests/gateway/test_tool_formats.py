"""The format of calls is known from the chat template, and grammars describe what is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway.tool_texts import (
    ARGUMENTS,
    FUNCTIONS,
    JSON,
    ONE_CALL,
    TIME,
    WEATHER,
    read_freely,
    taken,
    wire_reader,
)
from llguidance import LLMatcher, LLTokenizer
from loraplex import ChatTemplateInfo, ModelDescription, NamedToken
from loraplex_gateway.errors import ApiError
from loraplex_gateway.tools import ToolPlan, grammar, plan, reader, with_tools
from loraplex_gateway.tools.deltas import joined
from loraplex_gateway.tools.formats.known import FORMATS, detected
from loraplex_gateway.tools.grammar import Wire
from loraplex_model.checkpoints.chat import ChatOptions, ChatTemplate
from model.chat_styles import SPECIAL_TOKENS, STYLES

NAMES = sorted(FORMATS)

OF_STYLES = {
    "llama3_tools": "llama3_json",
    "mistral3": "mistral",
    "qwen2.5": "hermes",
    "qwen3": "hermes",
    "granite": "granite",
    "hermes": "hermes",
}
"""Styles that render calls, and the formats of these."""

SILENT = {"chatml", "llama2", "llama3", "mistral1", "gemma2", "gemma3", "zephyr", "falcon", "olmo"}
"""Styles that know nothing of calls."""

SCHEMA_ANSWER = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}


def model(template: str = STYLES["qwen2.5"], **fields: Any) -> ModelDescription:
    info = ChatTemplateInfo(
        sha256="", source="model", takes_tools="tools" in template, variables=(), text=template
    )
    given: dict[str, Any] = {
        "name": "toy",
        "fingerprint": "",
        "architecture": "",
        "max_context": 512,
        "vocab_size": 256,
        "eos_tokens": (NamedToken(2, "<|im_end|>"),),
        "bos_token": None,
        "has_tokenizer": True,
        "chat_template": info,
        "has_structured_output": True,
    }
    return ModelDescription(**{**given, **fields})


def planned(*tools: Any, **request: Any) -> ToolPlan:
    found = plan(request.pop("model", model()), tools or (WEATHER, TIME), **request)
    assert found is not None
    return found


def accepts(rules: str, text: str) -> bool:
    """Whether llguidance takes a text as a whole completion."""
    tokenizer = LLTokenizer("byte")
    built = LLMatcher.grammar_from_lark(rules)
    assert not LLMatcher.validate_grammar(built, tokenizer)
    matcher = LLMatcher(tokenizer, built)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("style", sorted(OF_STYLES))
def test_what_a_template_renders_is_read_again(style: str) -> None:
    name = detected(STYLES[style])
    assert name == OF_STYLES[style]
    template = ChatTemplate(STYLES[style], SPECIAL_TOKENS)
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS},
    }
    chat: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    before = template.render(chat)
    chat.append({"role": "assistant", "content": "", "tool_calls": [call]})
    whole = template.render(chat, ChatOptions(add_generation_prompt=False))
    written = whole[len(before.rstrip()) :].removesuffix("\n")
    for end in ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"):
        written = written.removesuffix(end)
    assert "weather" in written
    found = read_freely(name, *written)
    assert found.shown.strip() in ("", "<think>\n\n</think>")
    ((function, arguments),) = found.calls
    assert function == "weather"
    assert json.loads(arguments) == ARGUMENTS


@pytest.mark.parametrize("style", sorted(SILENT))
def test_templates_without_calls_have_no_format(style: str) -> None:
    assert detected(STYLES[style]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_an_example_in_a_template_tells_its_format(name: str) -> None:
    signs = {
        "llama3_json": "<|start_header_id|>",
        "llama3_pythonic": "<|start_header_id|>[func_name1(params_name1=params_value1)]",
        "glm4": "<|observation|>",
    }
    template = "{% for tool in tools %}" + ONE_CALL[name] + signs.get(name, "")
    assert detected(template.replace('"', '\\"')) == name


@pytest.mark.parametrize("name", NAMES)
def test_enforced_calls_are_read_as_calls(name: str) -> None:
    form = FORMATS[name].form
    rules = grammar.enforced(form.rules(list(FUNCTIONS.values()), False))
    if isinstance(form, Wire):
        text = f"{form.first}{form.head('weather')}{JSON}{form.closing}{form.last}"
        found = taken(wire_reader(name), *text)
    else:
        text = ONE_CALL[name].replace("'Köln \"1\"'", '"Köln \\"1\\""')
        found = read_freely(name, *text)
    assert accepts(rules, text)
    ((function, arguments),) = found.calls
    assert (function, json.loads(arguments), found.shown) == ("weather", ARGUMENTS, "")
    assert not accepts(rules, text.replace("city", "town"))
    assert not accepts(rules, text.replace("weather", "wether"))
    assert not accepts(rules, "hello")
    assert not accepts(rules, "")
    assert not accepts(rules, text * 2)


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_enforced_instead_of_an_answer_or_beside_it(name: str) -> None:
    found = planned(choice="required", tool_format=name)
    assert not accepts(found.grammar, '{"sum": 1}')
    found = planned(tool_format=name, answer=SCHEMA_ANSWER)
    assert accepts(found.grammar, '{"sum": 1}')
    assert not accepts(found.grammar, '{"sum": "x"}')
    form = found.enforced
    assert form is not None
    text = ONE_CALL[name]
    if isinstance(form, Wire):
        text = f"{form.first}{form.head('weather')}{JSON}{form.closing}{form.last}"
    else:
        text = text.replace("'Köln \"1\"'", '"Köln \\"1\\""')
    assert accepts(found.grammar, text)
    for written, calls in (('{"sum": 1}', 0), (text, 1)):
        each = reader(found)
        shown, made = joined([*(d for c in written for d in each.feed(c)), *each.end()])
        assert len(made) == calls
        assert shown == ("" if calls else written)


def test_a_function_without_arguments_gets_none() -> None:
    rules = planned(TIME, choice="required").grammar
    assert accepts(rules, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>')
    assert not accepts(rules, '<tool_call>\n{"name": "time", "arguments": {"a": 1}}\n</tool_call>')


def test_the_named_function_is_called_once() -> None:
    choice = {"type": "function", "function": {"name": "time"}}
    rules = planned(choice=choice).grammar
    call = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert accepts(rules, call)
    assert not accepts(rules, f"{call}\n{call}")
    assert not accepts(rules, ONE_CALL["hermes"])
    assert accepts(planned(choice="required").grammar, f"{call}\n{call}")
    assert not accepts(planned(choice="required", parallel=False).grammar, f"{call}\n{call}")


def test_definitions_of_a_schema_are_found_by_each_call() -> None:
    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    for name in NAMES:
        rules = planned(tool, choice="required", tool_format=name).grammar
        assert not LLMatcher.validate_grammar(
            LLMatcher.grammar_from_lark(rules), LLTokenizer("byte")
        )
    rules = planned(tool, choice="required").grammar
    text = '<tool_call>\n{"name": "go", "arguments": {"at": {"x": %s}}}\n</tool_call>'
    assert accepts(rules, text % "1")
    assert not accepts(rules, text % '"1"')


def test_a_schema_is_never_read_as_a_rule_of_llama_cpp() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "enum": ["x ::= y"], "description": "b ::= c"}},
        "required": ["a"],
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    for name in NAMES:
        found = planned(tool, choice="required", tool_format=name)
        assert "::=" not in found.grammar
    text = '<tool_call>\n{"name": "go", "arguments": {"a": "x ::= y"}}\n</tool_call>'
    assert accepts(planned(tool, choice="required").grammar, text)
    text = "<tool_call>go\n<arg_key>a</arg_key>\n<arg_value>x ::= y</arg_value>\n</tool_call>"
    assert accepts(planned(tool, choice="required", tool_format="glm45").grammar, text)


def test_a_schema_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"not": deep}
    tool = {"type": "function", "function": {"name": "go", "parameters": deep}}
    with pytest.raises(ApiError) as refused:
        planned(tool, choice="required")
    assert (refused.value.status, refused.value.param) == (400, "tools")


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


@pytest.mark.parametrize("name", ["hermes", "command_r"])
def test_strict_functions_leave_text_free_and_calls_not(name: str) -> None:
    found = planned(strict(WEATHER), strict(TIME), tool_format=name)
    call = ONE_CALL["hermes"]
    if name == "command_r":
        call = f'Action: ```json\n[{{"tool_name": "weather", "parameters": {JSON}}}]\n```'
    for text in ("", "Hello <tool", f"I look. {call} and {call}", call):
        assert accepts(found.grammar, text)
    assert not accepts(found.grammar, call.replace("city", "town"))
    assert not accepts(found.grammar, f"so: {call[:20]}oops")
    alone = planned(strict(WEATHER), tool_format=name, parallel=False)
    assert accepts(alone.grammar, f"so: {call}")
    assert not planned(WEATHER, strict(TIME), tool_format=name).grammar
    without = model(has_structured_output=False)
    assert not planned(strict(WEATHER), tool_format=name, model=without).grammar


def test_options_for_the_server() -> None:
    assert planned(WEATHER).options == {
        "tools": (
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "The weather in a town",
                    "parameters": WEATHER["function"]["parameters"],
                },
            },
        ),
        "skip_special_tokens": False,
    }
    options = planned(TIME, choice="required").options
    assert options["grammar"].startswith("start: calls")
    assert "skip_special_tokens" not in options
    assert options["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_json_may_be_asked_for_beside_tools_and_other_forms_may_not() -> None:
    given = {"temperature": 0.0, "json_schema": json.dumps(SCHEMA_ANSWER)}
    options, found = with_tools(given, model(), [TIME])
    assert found is not None
    assert options.keys() == {"temperature", "tools", "grammar"}
    assert accepts(options["grammar"], '{"sum": 3}')
    options, found = with_tools({"json_object": True}, model(), [TIME])
    assert accepts(options["grammar"], '{"a": 3}')
    assert with_tools(given, model(), None) == (given, None)
    assert with_tools({"regex": "a+"}, model(), [TIME], "none") == ({"regex": "a+"}, None)
    options, _ = with_tools({"regex": "a+"}, model(), [TIME], "required")
    assert options.keys() == {"tools", "grammar"}
    for wrong in ({"regex": "a+"}, {"json_schema": "oops"}, {"json_schema": "[]"}):
        with pytest.raises(ApiError) as refused:
            with_tools(wrong, model(), [TIME])
        assert refused.value.status == 400


def test_the_end_token_is_not_shown() -> None:
    each = reader(planned(model=model(eos_tokens=(NamedToken(2, "<end>"),))))
    assert joined([*each.feed("Hi<end>"), *each.end()]) == ("Hi", [])


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_without_tools_nothing_is_planned(choice: Any) -> None:
    assert plan(model(), None, choice) is None
    assert plan(model(), [], choice) is None
    assert joined(reader(None).feed("a <tool_call>")) == ("a <tool_call>", [])


def test_nothing_is_planned_if_no_function_may_be_called() -> None:
    assert plan(model(), [WEATHER], "none") is None


def test_allowed_functions() -> None:
    tools = [{"type": "function", "function": {"name": "time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}
    found = planned(choice=choice)
    assert not accepts(found.grammar, ONE_CALL["hermes"])
    assert len(found.rendered) == 2
    flat = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "time"}],
    }
    each = reader(planned(choice=flat))
    text = ONE_CALL["hermes"]
    assert joined([*each.feed(text), *each.end()]) == (text, [])


FUNCTION = {"type": "function"}


@pytest.mark.parametrize(
    ("tools", "request_", "param"),
    [
        (["weather"], {}, "tools[0]"),
        ([{"type": "web_search"}], {}, "tools[0].type"),
        ([FUNCTION], {}, "tools[0].function"),
        ([{**FUNCTION, "function": {}}], {}, "tools[0].function.name"),
        ([{**FUNCTION, "function": {"name": "a b"}}], {}, "tools[0].function.name"),
        ([{**FUNCTION, "function": {"name": "ü"}}], {}, "tools[0].function.name"),
        ([{**FUNCTION, "function": {"name": "a" * 65}}], {}, "tools[0].function.name"),
        ([TIME, TIME], {}, "tools[1].function.name"),
        ([TIME] * 129, {}, "tools"),
        (
            [{**FUNCTION, "function": {"name": "a", "description": 3}}],
            {},
            "tools[0].function.description",
        ),
        ([{**FUNCTION, "function": {"name": "a", "strict": 1}}], {}, "tools[0].function.strict"),
        (
            [{**FUNCTION, "function": {"name": "a", "parameters": []}}],
            {},
            "tools[0].function.parameters",
        ),
        (
            [{**FUNCTION, "function": {"name": "a", "parameters": {"type": "array"}}}],
            {},
            "tools[0].function.parameters.type",
        ),
        (
            [{**FUNCTION, "function": {"name": "a", "parameters": {"properties": []}}}],
            {},
            "tools[0].function.parameters.properties",
        ),
        ([TIME], {"choice": "any"}, "tool_choice"),
        ([TIME], {"choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ([TIME], {"choice": {"type": "function", "function": 3}}, "tool_choice"),
        ([TIME], {"choice": {"type": "allowed_tools"}}, "tool_choice"),
        ([TIME], {"choice": 3}, "tool_choice"),
        ([], {"choice": "required"}, "tool_choice"),
        ([TIME], {"answer": {"type": "array"}}, "response_format"),
        ([TIME], {"model": model(STYLES["chatml"])}, "tools"),
        ([TIME], {"model": model("{{ tools }}")}, "tools"),
        ([TIME], {"model": model(chat_template=None)}, "tools"),
    ],
)
def test_requests_that_are_refused(tools: Any, request_: Any, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        plan(request_.pop("model", model()), tools, **request_)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_names_that_python_does_not_have_are_refused_where_calls_are_written_in_it() -> None:
    tool = {"type": "function", "function": {"name": "get-weather"}}
    with pytest.raises(ApiError) as refused:
        planned(tool, choice="required", tool_format="olmo3")
    assert refused.value.status == 400
    assert "Python" in refused.value.message
