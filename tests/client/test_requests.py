"""Python arguments become the request they say, or an error that names the argument."""

from __future__ import annotations

import math

import pytest
from loraplex import InvalidRequest, requests
from loraplex.v1 import generation_pb2


def test_what_is_left_out_stays_unset_and_zero_is_kept():
    request = requests.generate("hi", temperature=0, top_k=0, logprobs=0, max_new_tokens=None)
    assert requests.generate("hi", max_new_tokens=0).stop.HasField("max_new_tokens")
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0
    assert request.sampling.HasField("top_k")
    assert request.HasField("logprobs")
    assert not request.sampling.HasField("top_p")
    assert not request.stop.HasField("max_new_tokens")
    assert not request.HasField("prompt_logprobs")


def test_every_option_lands_in_its_field():
    request = requests.generate(
        "hi",
        adapter="pirate@3",
        temperature=0.5,
        top_p=0.25,
        top_k=4,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={5: -1.0},
        seed=2**64 - 1,
        max_new_tokens=7,
        stop=["\n", "END"],
        stop_token_ids=[2, 3],
        ignore_eos=True,
        min_new_tokens=2,
        include_stop_string=True,
        n=5,
        return_prompt_token_ids=True,
        logprobs=3,
        prompt_logprobs=1,
        request_id="mine",
        priority=-4,
        cache_salt="tenant",
        skip_special_tokens=False,
    )
    assert request == generation_pb2.GenerateRequest(
        adapter_id="pirate@3",
        prompt="hi",
        sampling=generation_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=4,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.75,
            logit_bias={5: -1.0},
            seed=2**64 - 1,
        ),
        stop=generation_pb2.StopConditions(
            max_new_tokens=7,
            strings=["\n", "END"],
            token_ids=[2, 3],
            ignore_eos=True,
            min_new_tokens=2,
            include_stop_string=True,
        ),
        n=5,
        return_prompt_token_ids=True,
        logprobs=3,
        prompt_logprobs=1,
        request_id="mine",
        priority=-4,
        cache_salt="tenant",
        skip_special_tokens=False,
    )


def test_the_documented_options_cover_every_field_of_the_proto():
    fields = {
        field.name
        for kind in (generation_pb2.SamplingParams, generation_pb2.GenerateRequest)
        for field in kind.DESCRIPTOR.fields
    }
    renamed = {"adapter_id": "adapter"} | dict.fromkeys(("prompt", "sampling", "structured_output"))
    expected = {renamed.get(name, name) for name in fields} - {None}
    expected |= {field.name for field in generation_pb2.StopConditions.DESCRIPTOR.fields}
    expected = expected - {"strings"} | {"stop", "stop_token_ids"}
    expected |= {field.name for field in generation_pb2.ChatMessages.DESCRIPTOR.fields}
    expected |= {field.name for field in generation_pb2.StructuredOutput.DESCRIPTOR.fields}
    assert set(requests.GenerateOptions.__annotations__) == expected


def test_one_stop_string_need_not_be_a_list():
    assert list(requests.generate("hi", stop="END").stop.strings) == ["END"]


def test_the_three_kinds_of_input():
    assert requests.generate("").WhichOneof("input") == "prompt"
    assert list(requests.generate(token_ids=[1, 2]).token_ids.ids) == [1, 2]
    turns = requests.generate(messages=[{"role": "user", "content": "hi"}]).messages.messages
    assert [(turn.role, turn.content) for turn in turns] == [("user", "hi")]


def test_a_mix_keeps_an_unset_weight_unset():
    mix = requests.generate("hi", mix={"a": 0.5, "b": None}).mix
    assert [(term.adapter_id, term.weight) for term in mix] == [("a", 0.5), ("b", 0)]
    assert [term.HasField("weight") for term in mix] == [True, False]


USER = {"role": "user", "content": "hi"}


def chat(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


def call(**function):
    calls = [{"function": {"name": "f", **function}}]
    return {"messages": [{"role": "assistant", "tool_calls": calls}]}


def tools(*given):
    return {"messages": [USER], "tools": given}


def variables(**given):
    return {"messages": [USER], "chat_template_kwargs": given}


def test_messages_have_the_form_of_openais_api():
    function = {"name": "add", "arguments": '{"a": 1}'}
    request = requests.generate(
        messages=[
            {"role": "user", "content": ["a", {"type": "text", "text": "b"}], "name": None},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [
                    {"id": "c", "type": "function", "function": function},
                    {"function": {"name": "now", "arguments": {"é": [1]}}},
                    {"name": "now", "arguments": None},
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
            {"role": "assistant", "content": "", "reasoning_content": "so"},
        ],
        tools=[{"type": "function"}, '{"type": "function"}'],
        continue_final_message=True,
    )
    assert request.messages == generation_pb2.ChatMessages(
        messages=[
            {"role": "user", "parts": [{"text": "a"}, {"text": "b"}]},
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "c", "name": "add", "arguments": '{"a": 1}'},
                    {"name": "now", "arguments": '{"é": [1]}'},
                    {"name": "now", "arguments": "{}"},
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
            {"role": "assistant", "content": "", "reasoning_content": "so"},
        ],
        tools=['{"type": "function"}', '{"type": "function"}'],
        continue_final_message=True,
    )
    assert request.messages.messages[3].HasField("content")
    assert not request.messages.messages[1].HasField("content")
    assert not request.messages.HasField("add_generation_prompt")


def test_template_variables_keep_their_types():
    given = {"a": True, "b": 1, "c": 1.5, "d": "x", "e": None, "f": [True, "é"], "g": {"h": 1}}
    request = requests.generate(**variables(**given))
    assert request.messages == generation_pb2.ChatMessages(
        messages=[USER],
        chat_template_kwargs={
            "a": {"bool_value": True},
            "b": {"int_value": 1},
            "c": {"double_value": 1.5},
            "d": {"string_value": "x"},
            "e": {"json_value": "null"},
            "f": {"json_value": '[true, "é"]'},
            "g": {"json_value": '{"h": 1}'},
        },
    )


def test_a_request_to_render_holds_the_same_conversation():
    options = {"tools": [{"a": 1}], "add_generation_prompt": False}
    rendered = requests.render_chat([USER], "pirate", options)
    assert rendered.adapter_id == "pirate"
    assert rendered.messages == requests.generate(messages=[USER], **options).messages
    with pytest.raises(TypeError, match="temperature"):
        requests.render_chat([USER], None, {"temperature": 1})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "input"),
        ({"prompt": "a", "token_ids": [1]}, "input"),
        ({"prompt": "a", "messages": []}, "input"),
        ({"prompt": "a", "adapter": "a", "mix": {"b": 1.0}}, "mix"),
        ({"prompt": "a", "max_new_tokens": -1}, "stop.max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 2.5}, "stop.max_new_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "sampling.temperature"),
        ({"prompt": "a", "seed": 2**64}, "sampling.seed"),
        ({"prompt": "a", "logit_bias": {-1: 2.0}}, "sampling.logit_bias"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "stop": [b"\xff"]}, "stop.strings"),
        ({"prompt": "a", "mix": {"b": "much"}}, "mix[b].weight"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"token_ids": [1, -1]}, "token_ids.ids"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": {"role": "user", "content": "hi"}}, "messages"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools"),
        ({"messages": [USER], "chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
        ({"messages": [{"role": "a", "tool_calls": 3}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "hi", "weight": 1}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (chat({"type": "image_url", "image_url": {"url": "x"}}), "messages[0].content[0]"),
        (chat({"type": "text"}), "messages[0].content[0]"),
        (chat("a", 3), "messages[0].content[1]"),
        ({"messages": [{"role": "a", "tool_calls": ["f"]}]}, "messages[0].tool_calls[0]"),
        (call(arguments=3), "messages[0].tool_calls[0].arguments"),
        (call(arguments={"x": math.nan}), "messages[0].tool_calls[0].arguments"),
        (call(name=3), "messages[0].tool_calls[0].name"),
        (tools(["x"]), "tools[0]"),
        (tools({"x": object()}), "tools[0]"),
        (tools({"x": "\ud800"}), "tools"),
        (variables(v=2**63), "chat_template_kwargs[v].int_value"),
        (variables(v=object()), "chat_template_kwargs[v]"),
        (variables(v=[math.inf]), "chat_template_kwargs[v]"),
        (variables(v="\ud800"), "chat_template_kwargs[v].string_value"),
        ({"prompt": "a", "tools": [{}]}, "tools"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"token_ids": [1], "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_an_argument_no_message_can_carry_is_named(options, field):
    with pytest.raises(InvalidRequest) as caught:
        requests.generate(options.pop("prompt", None), **options)
    assert caught.value.reason == "FIELD_INVALID"
    assert [violation.field for violation in caught.value.violations] == [field]
    assert str(caught.value).startswith(field)


def test_ranges_are_left_to_the_server():
    request = requests.generate("hi", temperature=math.nan, top_p=7.0, priority=1000)
    assert math.isnan(request.sampling.temperature)
    assert request.priority == 1000


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="max_tokens"):
        requests.generate("hi", max_tokens=3)
