"""Conversations of requests reach the template as they were meant, or a field is named."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from loraplex import requests
from loraplex.v1 import generation_pb2
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.chat import ChatOptions
from loraplex_server.rpc.messages.conversation import (
    INLINE_BYTES,
    MAX_JSON_DEPTH,
    ChatInput,
    read_chat,
    unread,
)
from loraplex_server.runtime.lanes import Lanes

USER = {"role": "user", "content": "x"}


async def read(chat: dict[str, Any]) -> ChatInput:
    return await read_chat(generation_pb2.ChatMessages(**chat), "messages", Lanes().text)


async def at_fault(chat: dict[str, Any]) -> list[str]:
    with pytest.raises(Refusal) as caught:
        await read(chat)
    return [problem.field for problem in caught.value.problems]


async def test_what_a_client_sends_is_what_the_template_gets() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5]}}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": ""},
        {
            "role": "user",
            "content": [{"type": "text", "text": "2 + 2"}, {"type": "text", "text": ""}],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "",
            "tool_calls": [{"id": "c1", **call}, call],
        },
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"},
        {"role": "assistant", "content": "é"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "z": 1, "a": {"é": None}}}]
    variables = {"flag": False, "count": -3, "share": 0.5, "word": "", "list": [1, {"a": None}]}
    request = requests.generate(
        messages=messages,
        tools=tools,
        chat_template_kwargs=variables,
        add_generation_prompt=False,
    )
    chat = await read_chat(request.messages, "messages", Lanes().text)
    assert chat.messages == messages
    assert chat.options == ChatOptions(
        add_generation_prompt=False, tools=tools, variables=variables
    )
    assert json.dumps(chat.options.tools) == json.dumps(tools)  # in the order of the client
    kinds = {name: type(value) for name, value in chat.options.variables.items()}
    assert kinds == {name: type(value) for name, value in variables.items()}


async def test_content_that_older_clients_leave_out_is_empty() -> None:
    # Their field "content" has no presence: an empty text is not sent.
    call = {"name": "add"}
    chat = await read({"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [call]}]})
    assert [message["content"] for message in chat.messages] == ["", None]


async def test_a_large_conversation_is_read_in_a_thread() -> None:
    lane = Lanes().text
    ran: list[Any] = []

    async def run(work: Any, *args: Any) -> Any:
        ran.append(work)
        return work(*args)

    lane.run = run  # type: ignore[method-assign]
    for size, count in ((10, 0), (INLINE_BYTES, 1)):
        wire = generation_pb2.ChatMessages(messages=[{"role": "user", "content": "x" * size}])
        assert (await read_chat(wire, "messages", lane)).messages[0]["content"] == "x" * size
        assert len(ran) == count


NOT_JSON = [
    "{",
    "{'a': 1}",
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    '{"a": 1} x',
    "1" * 5000,
]


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:20])
async def test_a_text_that_is_not_json_is_named(text: str) -> None:
    calls = [{"name": "f", "arguments": text}]
    chat: dict[str, Any] = {
        "messages": [USER, {"role": "assistant", "tool_calls": calls}],
        "tools": ["{}", text],
        "chat_template_kwargs": {"v": {"json_value": text}},
    }
    assert await at_fault(chat) == [
        "messages.messages[1].tool_calls[0].arguments",
        "messages.tools[1]",
        "messages.chat_template_kwargs[v].json_value",
    ]


@pytest.mark.parametrize("text", ["[]", "1", '"{}"', "null", "true"])
async def test_tools_and_arguments_are_objects(text: str) -> None:
    calls = [{"name": "f", "arguments": text}]
    chat = {"messages": [{"role": "assistant", "tool_calls": calls}], "tools": [text]}
    fields = ["messages.messages[0].tool_calls[0].arguments", "messages.tools[0]"]
    assert await at_fault(chat) == fields
    variables = {"v": {"json_value": text}}
    found = await read({"messages": [USER], "chat_template_kwargs": variables})
    assert found.options.variables == {"v": json.loads(text)}


async def test_json_is_not_nested_without_bound() -> None:
    def nested(depth: int) -> str:
        return '{"a": ' * (depth - 1) + "{}" + "}" * (depth - 1)

    await read({"messages": [USER], "tools": [nested(MAX_JSON_DEPTH)]})
    for depth in (MAX_JSON_DEPTH + 1, 9000):
        assert await at_fault({"messages": [USER], "tools": [nested(depth)]}) == [
            "messages.tools[0]"
        ]


async def test_no_arguments_are_an_empty_object() -> None:
    calls = [{"name": "f"}, {"name": "f", "arguments": "{}"}]
    chat = await read({"messages": [{"role": "assistant", "tool_calls": calls}]})
    expected = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert chat.messages[0]["tool_calls"] == [expected, expected]


def test_options_that_a_template_does_not_read_are_named() -> None:
    template: Any = SimpleNamespace(takes_tools=False, variables=("enable_thinking",))
    options = ChatOptions(tools=[{}], variables={"enable_thinking": True, "messages": 1})
    found = unread(options, template, "messages")
    assert [problem.field for problem in found] == [
        "messages.tools",
        "messages.chat_template_kwargs[messages]",
    ]
    assert "enable_thinking" in found[1].message
    template = SimpleNamespace(takes_tools=True, variables=())
    assert unread(ChatOptions(tools=[{}]), template, "messages") == []
