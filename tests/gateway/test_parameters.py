"""Every field of a request is mapped, ignored because it changes nothing, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from loraplex_gateway.chat.request import CHAT_NEUTRAL, ChatRequest, chat_options
from loraplex_gateway.completions.request import (
    CompletionRequest,
    completion_options,
    prompts_of,
)
from loraplex_gateway.errors import ApiError, param_of
from loraplex_gateway.generation.parameters import PARAMS
from loraplex_gateway.models.ids import is_legal
from loraplex_gateway.wire.bodies import HARMLESS, NEUTRAL, convert, loads
from loraplex_server.rpc.calls.ids import is_adapter_id

CONTEXT = 1000
TALK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = chat_options(convert(TALK, ChatRequest), CONTEXT)


def chat(**fields: Any) -> dict[str, Any]:
    """What the fields add to the client's options."""
    request = convert({**TALK, **fields}, ChatRequest, neutral=CHAT_NEUTRAL)
    found = chat_options(request, CONTEXT)
    return {k: v for k, v in found.items() if v is not None and PLAIN.get(k) != v}


def text(**fields: Any) -> dict[str, Any]:
    """The same for a completion."""
    request = convert({"model": "m", "prompt": "hi", **fields}, CompletionRequest)
    found = completion_options(request)
    return {k: v for k, v in found.items() if v is not None and (k, v) != ("max_new_tokens", 16)}


SAME = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
    "presence_penalty": -0.5, "frequency_penalty": 0.5, "seed": 7, "stop_token_ids": [5],
    "ignore_eos": True, "skip_special_tokens": False, "cache_salt": "s", "n": 3,
}  # fmt: skip
"""Fields that the client's options have under the same name."""


@pytest.mark.parametrize("read", [chat, text])
@pytest.mark.parametrize("name", SAME)
def test_a_field_becomes_the_option_of_its_name(read: Any, name: str) -> None:
    assert read(**{name: SAME[name]}) == {name: SAME[name]}


@pytest.mark.parametrize("read", [chat, text])
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"priority": 3}, {"priority": -3}),
        ({"priority": -3}, {"priority": 3}),
        ({"logit_bias": {"50256": -100}}, {"logit_bias": {50256: -100}}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"min_tokens": 2}, {"min_new_tokens": 2}),
        ({"min_tokens": 0}, {}),
        ({"include_stop_str_in_output": True}, {"include_stop_string": True}),
        ({"include_stop_str_in_output": False}, {}),
        ({"return_token_ids": True}, {"return_prompt_token_ids": True}),
        ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
        ({"best_of": 1}, {}),
        ({"n": 1}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_object", "schema": {"a": 1}}},
            {"json_schema": '{"a": 1}'},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "null"}},
                }
            },
            {"json_schema": '{"type": "null"}'},
        ),
        ({"structured_outputs": {"json": {}}}, {"json_schema": "{}"}),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, {"json_schema": '{"type": "null"}'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choices": ["a", "b"]}),
        ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}),
        ({"guided_json": {"é": 1}}, {"json_schema": '{"é": 1}'}),
        ({"guided_regex": "a"}, {"regex": "a"}),
        ({"guided_choice": ["a"]}, {"choices": ["a"]}),
        ({"guided_grammar": "g"}, {"grammar": "g"}),
        ({"guided_json": None, "guided_decoding_backend": "x"}, {}),
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a"}, {"regex": "a"}),
        ({"ebnf": "root ::= A"}, {"grammar": "root ::= A"}),
        ({"grammar": "root ::= A"}, {"grammar": "root ::= A"}),
        ({"grammar": {"type": "regex", "value": "a"}}, {"regex": "a"}),
        ({"grammar": {"type": "json", "value": {}}}, {"json_schema": "{}"}),
    ],
)
def test_a_field_of_another_form_is_translated(
    read: Any, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    assert read(**fields) == options


def test_fields_of_chats_alone_are_translated() -> None:
    assert chat(max_completion_tokens=5, max_tokens=9) == {"max_new_tokens": 5}
    assert chat(max_tokens=CONTEXT + 5) == {}
    assert PLAIN["max_new_tokens"] == CONTEXT
    assert chat(logprobs=True) == {"logprobs": 0}
    assert chat(logprobs=True, top_logprobs=4) == {"logprobs": 4}
    assert chat(chat_template_kwargs={"a": 1}) == {"chat_template_kwargs": {"a": 1}}
    assert chat(reasoning_effort="low") == {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert chat(reasoning_effort="none") == {}
    assert chat(add_generation_prompt=False) == {"add_generation_prompt": False}
    assert chat(continue_final_message=True) == {
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_fields_of_completions_alone_are_translated() -> None:
    assert text(logprobs=0) == {"logprobs": 0}
    assert text(echo=True) == {}
    scores = {"logprobs": 1, "prompt_logprobs": 1, "return_prompt_token_ids": True}
    assert text(echo=True, logprobs=1) == scores
    assert text(max_tokens=0) == {"max_new_tokens": 0}


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_changes_no_answer_is_ignored(name: str) -> None:
    assert chat(**{name: {"any": ["thing"]}}) == {}
    assert text(**{name: 3.5}) == {}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_defaults_of_what_is_not_supported_are_ignored(name: str) -> None:
    for value in NEUTRAL[name]:
        assert chat(**{name: value}) == {}
    with pytest.raises(ApiError) as caught:
        chat(**{name: ["something", "else"]})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "name",
    [
        "audio",
        "chat_template",
        "echo",
        "allowed_token_ids",
        "truncate_prompt_tokens",
        "functions",
        "function_call",
        "logit_processors",
        "web_search_options",
        "prompt_embeds",
        "temprature",
    ],
)
def test_what_would_change_the_answer_is_refused_unless_it_is_null(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**{name: "x"})
    assert caught.value.status == 400
    assert caught.value.param == name
    assert caught.value.code == "unknown_parameter"
    assert chat(**{name: None}) == {}


@pytest.mark.parametrize("read", [chat, text])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"stop": 7}, "stop"),
        ({"stop": [7]}, "stop[0]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
        ({"model": 7}, "model"),
        ({"model": None}, "model"),
        ({"loraplex": {"mix": [{"weight": 1}]}}, "loraplex.mix[0].adapter"),
    ],
)
def test_the_field_at_fault_is_named(read: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param.split("[")[0] in caught.value.message


def test_log_probabilities_of_chats_and_completions_have_their_own_bounds() -> None:
    for fields in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}):
        with pytest.raises(ApiError) as caught:
            chat(**fields)
        assert caught.value.param == "top_logprobs"
    for given in (-1, 21):
        with pytest.raises(ApiError) as caught:
            text(logprobs=given)
        assert caught.value.param == "logprobs"
    with pytest.raises(ApiError):
        text(logprobs=True)
    with pytest.raises(ApiError):
        chat(logprobs=1)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_are_read_in_their_four_forms(prompt: Any, prompts: list[Any]) -> None:
    assert prompts_of(convert({"model": "m", "prompt": prompt}, CompletionRequest)) == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        (["hi", 1], "prompt"),
        ([[1], 2], "prompt"),
        ([-1], "prompt[0]"),
        ([[1, 2**32]], "prompt[0][1]"),
        (["x"] * 2049, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
    ],
)
def test_other_prompts_are_refused(prompt: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        prompts_of(convert({"model": "m", "prompt": prompt}, CompletionRequest))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sampling.temperature", "temperature"),
        ("sampling.logit_bias[7]", "logit_bias[7]"),
        ("stop.max_new_tokens", "max_tokens"),
        ("stop.strings[2]", "stop[2]"),
        ("stop.token_ids[0]", "stop_token_ids[0]"),
        ("messages.messages[3].content", "messages[3].content"),
        ("messages.chat_template_kwargs[x]", "chat_template_kwargs[x]"),
        ("token_ids.ids[4]", "prompt[4]"),
        ("mix[1].weight", "loraplex.mix[1].weight"),
        ("mix", "loraplex.mix"),
        ("priority", "priority"),
        ("structured_output.json_schema", "response_format"),
        ("adapter_id", "model"),
    ],
)
def test_a_field_of_the_server_is_named_as_in_the_request(ours: str, theirs: str) -> None:
    assert param_of(ours, PARAMS) == theirs


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"7", b'"x"', b"null", b"{'a': 1}", b'{"a": NaN}', b'{"a": 1e999}',
        b"\xff\xfe", b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000,
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        loads(data)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"


def test_a_deeply_nested_value_is_refused_not_a_fault() -> None:
    nested: Any = {}
    for _ in range(100_000):
        nested = {"a": nested}
    with pytest.raises(ApiError) as caught:
        chat(response_format={"type": "json_object", "schema": nested})
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "text",
    ["a", "a-b", "a@1", "a@12", "a@sha256:" + "0" * 64, "a" * 63, "a" * 64, "-a", "a-", "a@0",
     "a@01", "A", "a@", "a@1@2", "a b", "", "a\n", "é", "a@٣", "a@99999999999"],
)  # fmt: skip
def test_the_gateway_and_the_server_agree_on_what_an_adapters_id_is(text: str) -> None:
    assert is_legal(text) == is_adapter_id(text)
