"""Every bound of the proto is held, at its edge and beyond, and all that is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.v1 import generation_pb2, model_pb2
from loraplex_server.rpc.calls.ids import is_adapter_id, is_name
from loraplex_server.rpc.messages import validate
from loraplex_server.rpc.messages.validate import ModelBounds

BOUNDS = ModelBounds(vocab_size=100, max_context=50)
NAN, INF = float("nan"), float("inf")
DIGEST = "sha256:" + "0a" * 32


def violations(**fields: Any) -> list[str]:
    """The fields at fault in an otherwise good request."""
    request = {"token_ids": {"ids": [1, 2]}, **fields}
    wrong = validate.generate(generation_pb2.GenerateRequest(**request), BOUNDS)
    assert all(v.message for v in wrong)
    return [v.field for v in wrong]


def sampling(**fields: Any) -> list[str]:
    return violations(sampling=fields)


def stop(**fields: Any) -> list[str]:
    return violations(stop=fields)


GOOD = [
    {},
    {"prompt": "x"},
    {"messages": {"messages": [{"role": "user", "content": ""}]}},
    {"adapter_id": "a"},
    {"adapter_id": "a@1"},
    {"adapter_id": f"a@{DIGEST}"},
    {"mix": [{"adapter_id": "a", "weight": -16}] * 8},
    {"mix": [{"adapter_id": "a"}]},
    {"sampling": {"temperature": 0, "top_p": 1, "min_p": 1, "repetition_penalty": 100}},
    {"sampling": {"temperature": 100, "presence_penalty": -2, "frequency_penalty": 2}},
    {"sampling": {"top_k": 2**32 - 1, "seed": 2**64 - 1}},
    {"sampling": {"logit_bias": {99: 100, 0: -100}}},
    {"stop": {"max_new_tokens": 1, "strings": ["x" * 64] * 16, "token_ids": [99] * 64}},
    {"stop": {"max_new_tokens": 2**32 - 1}},
    {"stop": {"max_new_tokens": 0}},
    {"logprobs": 20, "prompt_logprobs": 0},
    {"request_id": "~" * 128, "priority": -10},
    {"priority": 10},
    {"cache_salt": "ä" * 64},
    {"cache_salt": ""},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_what_is_within_bounds_passes(fields: dict[str, Any]) -> None:
    if "prompt" in fields or "messages" in fields:
        request = generation_pb2.GenerateRequest(**fields)
        assert validate.generate(request, BOUNDS) == []
    else:
        assert violations(**fields) == []


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"adapter_id": "A"}, ["adapter_id"]),
    ({"adapter_id": "a@0"}, ["adapter_id"]),
    ({"adapter_id": "a", "mix": [{"adapter_id": "b"}]}, ["adapter_id"]),
    ({"mix": [{"adapter_id": ""}]}, ["mix[0].adapter_id"]),
    ({"mix": [{"adapter_id": "a"}, {"adapter_id": "b", "weight": 16.1}]}, ["mix[1].weight"]),
    ({"mix": [{"adapter_id": "a", "weight": NAN}]}, ["mix[0].weight"]),
    ({"mix": [{"adapter_id": "a", "weight": -INF}]}, ["mix[0].weight"]),
    ({"mix": [{"adapter_id": "a"}] * 9}, ["mix"]),
    ({"token_ids": {}}, ["token_ids.ids"]),
    ({"token_ids": {"ids": [1, 100]}}, ["token_ids.ids[1]"]),
    ({"sampling": {"temperature": NAN}}, ["sampling.temperature"]),
    ({"sampling": {"temperature": -0.1}}, ["sampling.temperature"]),
    ({"sampling": {"temperature": INF}}, ["sampling.temperature"]),
    ({"sampling": {"top_p": 0}}, ["sampling.top_p"]),
    ({"sampling": {"top_p": 1.01}}, ["sampling.top_p"]),
    ({"sampling": {"top_p": NAN}}, ["sampling.top_p"]),
    ({"sampling": {"min_p": -0.01}}, ["sampling.min_p"]),
    ({"sampling": {"repetition_penalty": 0}}, ["sampling.repetition_penalty"]),
    ({"sampling": {"presence_penalty": 2.1}}, ["sampling.presence_penalty"]),
    ({"sampling": {"frequency_penalty": -2.1}}, ["sampling.frequency_penalty"]),
    ({"sampling": {"logit_bias": {100: 1}}}, ["sampling.logit_bias[100]"]),
    ({"sampling": {"logit_bias": {1: NAN}}}, ["sampling.logit_bias[1]"]),
    ({"sampling": {"logit_bias": dict.fromkeys(range(301), 1)}}, ["sampling.logit_bias"]),
    ({"stop": {"max_new_tokens": 1, "min_new_tokens": 2}}, ["stop.min_new_tokens"]),
    ({"stop": {"strings": [""]}}, ["stop.strings[0]"]),
    ({"stop": {"strings": ["ok", "é" * 33]}}, ["stop.strings[1]"]),
    ({"stop": {"strings": ["x"] * 17}}, ["stop.strings"]),
    ({"stop": {"token_ids": [1] * 65}}, ["stop.token_ids"]),
    ({"stop": {"token_ids": [100]}}, ["stop.token_ids[0]"]),
    ({"logprobs": 21}, ["logprobs"]),
    ({"prompt_logprobs": 21}, ["prompt_logprobs"]),
    ({"request_id": "x" * 129}, ["request_id"]),
    ({"request_id": "two\nlines"}, ["request_id"]),
    ({"request_id": "é"}, ["request_id"]),
    ({"priority": 11}, ["priority"]),
    ({"cache_salt": "s" * 129}, ["cache_salt"]),
    ({"cache_salt": "ä" * 65}, ["cache_salt"]),
    ({"priority": -(2**31)}, ["priority"]),
    (
        {"adapter_id": "..", "sampling": {"top_p": 2, "min_p": 2}, "priority": 11},
        ["adapter_id", "sampling.min_p", "sampling.top_p", "priority"],
    ),
]


@pytest.mark.parametrize(("fields", "at_fault"), BAD, ids=lambda value: str(value)[:60])
def test_what_is_beyond_is_named(fields: dict[str, Any], at_fault: list[str]) -> None:
    assert violations(**fields) == at_fault


def test_an_input_must_be_given() -> None:
    wrong = validate.generate(generation_pb2.GenerateRequest(), BOUNDS, "request.")
    assert [v.field for v in wrong] == ["request.input"]
    request = generation_pb2.GenerateRequest(prompt="")
    assert [v.field for v in validate.generate(request, BOUNDS)] == ["prompt"]
    request = generation_pb2.GenerateRequest(messages={"messages": [{"content": "x"}]})
    assert [v.field for v in validate.generate(request, BOUNDS)] == ["messages.messages[0].role"]
    request = generation_pb2.GenerateRequest(messages={})
    assert [v.field for v in validate.generate(request, BOUNDS)] == ["messages.messages"]


def test_a_flood_of_violations_is_cut_to_what_a_trailer_carries() -> None:
    request = generation_pb2.GenerateRequest(
        token_ids={"ids": [1]},
        mix=[{"adapter_id": "..", "weight": 99}] * 8,
        sampling={"logit_bias": dict.fromkeys(range(200, 500), 1e9)},
        stop={"strings": ["x" * 65] * 16},
    )
    assert len(validate.generate(request, BOUNDS)) == validate.MAX_LISTED


def test_a_million_stop_strings_are_refused_at_once() -> None:
    request = generation_pb2.GenerateRequest(
        token_ids={"ids": [1]}, stop={"strings": ["x"] * 1_000_000}
    )
    assert [v.field for v in validate.generate(request, BOUNDS)] == ["stop.strings"]


NOT_NAMES = [
    "",
    "-a",
    "a-",
    "A",
    "a_b",
    "a.b",
    "..",
    "a/b",
    "a\\b",
    "a\n",
    "a\0",
    "%2e%2e",
    "\uff0e",
    "a" * 64,
    "é",
    "\u0661",
    " a",
    "a ",
]


@pytest.mark.parametrize("text", NOT_NAMES, ids=repr)
def test_what_is_no_name_is_refused(text: str) -> None:
    assert not is_name(text)
    assert not is_adapter_id(text)


@given(st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"))
def test_every_label_is_a_name(text: str) -> None:
    assert is_name(text)
    assert is_adapter_id(text)


@given(st.text(max_size=70))
def test_only_labels_are_names(text: str) -> None:
    good = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    label = 0 < len(text) < 64 and set(text) <= good and "-" not in (text[0], text[-1])
    assert is_name(text) == label


@pytest.mark.parametrize(
    "pin", ["", "0", "01", "-1", "x", "1@2", "sha256:", DIGEST[:-1], DIGEST.upper(), DIGEST + "\n"]
)
def test_what_is_no_pin_is_refused(pin: str) -> None:
    assert not is_adapter_id(f"a@{pin}")


CALL = {"name": "f", "arguments": "{}"}
USER = {"role": "user", "content": "x"}

GOOD_CHATS: list[dict[str, Any]] = [
    *({"messages": [{"role": role, "content": ""}]} for role in validate.ROLES),
    *({"messages": [{"role": role}]} for role in validate.ROLES),
    {"messages": [{"role": "assistant", "reasoning_content": "x"}]},
    {"messages": [{"role": "user", "parts": [{"text": "a"}, {"text": ""}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [CALL] * 128}]},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
    {"messages": [{"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"}]},
    {"messages": [{"role": "assistant", "content": "a", "reasoning_content": ""}]},
    {"messages": [USER], "tools": ["{}"] * 128},
    {"messages": [USER], "tools": ["x" * 65536]},
    {"messages": [USER], "add_generation_prompt": True, "continue_final_message": False},
    {"messages": [USER], "add_generation_prompt": False, "continue_final_message": True},
    {
        "messages": [USER],
        "chat_template_kwargs": {
            "a": {"bool_value": False},
            "b": {"int_value": -(2**63)},
            "c": {"double_value": 1e308},
            "d": {"string_value": "x" * 8192},
            "e": {"json_value": ""},
        },
    },
]


@pytest.mark.parametrize("chat", GOOD_CHATS, ids=lambda value: str(value)[:60])
def test_a_conversation_within_bounds_passes(chat: dict[str, Any]) -> None:
    request = generation_pb2.GenerateRequest(messages=chat)
    assert validate.generate(request, BOUNDS) == []
    rendered = model_pb2.RenderChatRequest(adapter_id="a@2", messages=chat)
    assert validate.render_chat(rendered) == []


def one(**message: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **message}]}


def value(**kind: Any) -> dict[str, Any]:
    return {"messages": [USER], "chat_template_kwargs": {"v": kind}}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    (one(content="x", parts=[{"text": "y"}]), "messages[1].parts"),
    (one(parts=[{}]), "messages[1].parts[0]"),
    (one(parts=[{"text": "y"}] * 65), "messages[1].parts"),
    (one(content="x", tool_call_id="1"), "messages[1].tool_call_id"),
    (one(role="user", content="x", tool_calls=[CALL]), "messages[1].tool_calls"),
    (one(role="tool", content="x", reasoning_content="y"), "messages[1].reasoning_content"),
    (one(tool_calls=[CALL, {"arguments": "{}"}]), "messages[1].tool_calls[1].name"),
    (one(tool_calls=[CALL] * 129), "messages[1].tool_calls"),
    (
        one(tool_calls=[{"name": "f", "arguments": "\u00e9" * 40000}]),
        "messages[1].tool_calls[0].arguments",
    ),
    ({"messages": [USER], "tools": ["{}", ""]}, "tools[1]"),
    ({"messages": [USER], "tools": ["\u00e9" * 40000]}, "tools[0]"),
    ({"messages": [USER], "tools": ["{}"] * 129}, "tools"),
    (
        {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    (value(), "chat_template_kwargs[v]"),
    (value(double_value=NAN), "chat_template_kwargs[v].double_value"),
    (value(double_value=INF), "chat_template_kwargs[v].double_value"),
    (value(string_value="\u00e9" * 5000), "chat_template_kwargs[v].string_value"),
    (value(json_value="\u00e9" * 5000), "chat_template_kwargs[v].json_value"),
    (
        {
            "messages": [USER],
            "chat_template_kwargs": {str(i): {"bool_value": True} for i in range(33)},
        },
        "chat_template_kwargs",
    ),
]


@pytest.mark.parametrize(("chat", "field"), BAD_CHATS, ids=lambda value: str(value)[:60])
def test_what_is_wrong_with_a_conversation_is_named(chat: dict[str, Any], field: str) -> None:
    request = generation_pb2.GenerateRequest(messages=chat)
    assert [v.field for v in validate.generate(request, BOUNDS)] == [f"messages.{field}"]
    within = validate.generate(request, BOUNDS, "request.")
    assert [v.field for v in within] == [f"request.messages.{field}"]
    rendered = model_pb2.RenderChatRequest(messages=chat)
    assert [v.field for v in validate.render_chat(rendered)] == [f"messages.{field}"]


def test_an_adapter_to_render_for_is_checked() -> None:
    request = model_pb2.RenderChatRequest(adapter_id="A", messages={"messages": [USER]})
    assert [v.field for v in validate.render_chat(request)] == ["adapter_id"]
