"""Responses, as OpenAI's own client sees them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import BASE, Web
from gateway.scripted import openai_client, saying
from gateway.tool_texts import JSON, ONE_CALL, TIME, WEATHER

RESPONSES = "/v1/responses"
ASK: dict[str, Any] = {"model": BASE, "input": "Weather?", "temperature": 0}
TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
CALLS = "I look. " + ONE_CALL["hermes"] + ' <tool_call>{"name": "time"}</tool_call>'


async def events_of(web: Web, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream; each is named by its type, and there is nothing after the last."""
    answer = await web.post(RESPONSES, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


async def test_a_response_has_the_text_of_the_model(tmp_path: Path) -> None:
    async with saying(tmp_path, "Sunny, 日本.") as web, openai_client(web) as client:
        found = await client.responses.create(**ASK, metadata={"a": "b"}, store=True)
        assert found.output_text == "Sunny, 日本."
        assert found.status == "completed"
        assert (found.store, found.metadata) == (False, {"a": "b"})
        (message,) = found.output
        assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
        usage = found.usage
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.output_tokens > 3
        assert usage.input_tokens_details.cached_tokens == 0
        assert found.created_at > 1e9


async def test_a_response_that_is_cut_off_is_incomplete(tmp_path: Path) -> None:
    async with saying(tmp_path, "Sunny and dry") as web, openai_client(web) as client:
        found = await client.responses.create(**ASK, max_output_tokens=3)
        assert found.status == "incomplete"
        assert found.incomplete_details.reason == "max_output_tokens"
        assert found.output[0].status == "incomplete"
        assert "Sunny and dry".startswith(found.output_text)
        events = await events_of(web, {**ASK, "max_output_tokens": 3})
        assert events[-1]["type"] == "response.incomplete"


async def test_a_stream_tells_of_each_step_in_order(tmp_path: Path) -> None:
    async with saying(tmp_path, "Sunny") as web:
        events = await events_of(web, ASK)
        kinds = [event["type"].removeprefix("response.") for event in events]
        deltas = kinds.count("output_text.delta")
        assert deltas >= 1
        assert kinds == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            *["output_text.delta"] * deltas,
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        assert events[0]["response"]["status"] == "in_progress"
        assert events[0]["response"]["output"] == []
        assert events[2]["item"]["content"] == []
        ids = {each["item_id"] for each in events if "item_id" in each}
        assert ids == {events[2]["item"]["id"]}
        text = "".join(each["delta"] for each in events if "delta" in each)
        assert text == "Sunny" == events[-4]["text"]
        last = events[-1]["response"]
        assert last["output"] == [events[-2]["item"]]
        whole = await web.ok(RESPONSES, ASK)
        different = ("id", "created_at", "output", "usage")  # a prompt is computed once
        assert whole["usage"]["total_tokens"] == last["usage"]["total_tokens"]
        assert {k: v for k, v in whole.items() if k not in different} == {
            k: v for k, v in last.items() if k not in different
        }


async def test_calls_are_items_and_have_events(tmp_path: Path) -> None:
    async with saying(tmp_path, CALLS) as web:
        whole = await web.ok(RESPONSES, {**ASK, "tools": TOOLS})
        shown = [(i["type"], i.get("name"), i.get("arguments")) for i in whole["output"]]
        assert shown == [
            ("message", None, None),
            ("function_call", "weather", JSON),
            ("function_call", "time", "{}"),
        ]
        assert whole["output"][0]["content"][0]["text"] == "I look."
        assert len({item["id"] for item in whole["output"]}) == 3
        assert whole["tools"][0]["name"] == "weather"
        events = await events_of(web, {**ASK, "tools": TOOLS})
        items = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        assert [item["type"] for item in items] == [i["type"] for i in whole["output"]]
        assert items == events[-1]["response"]["output"]
        for index in (1, 2):
            own = [e for e in events if e.get("output_index") == index]
            kinds = [e["type"].rpartition("response.")[2] for e in own]
            assert kinds == [
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
            ]
            assert own[0]["item"]["arguments"] == ""
            assert own[1]["delta"] == own[2]["arguments"] == items[index]["arguments"]
        for before, after in pairwise(e["output_index"] for e in events if "output_index" in e):
            assert after >= before


async def test_openais_client_reads_the_stream_of_calls(tmp_path: Path) -> None:
    async with saying(tmp_path, CALLS) as web, openai_client(web) as client:
        async with client.responses.stream(**ASK, tools=TOOLS) as stream:
            kinds = [event.type async for event in stream]
            found = await stream.get_final_response()
        assert kinds[-1] == "response.completed"
        calls = [item for item in found.output if item.type == "function_call"]
        assert [call.name for call in calls] == ["weather", "time"]
        assert all(call.call_id.startswith("call_") for call in calls)
        raw = await client.responses.create(**ASK, tools=TOOLS, stream=True)
        again = [event.type async for event in raw]
        assert list(dict.fromkeys(again)) == list(dict.fromkeys(kinds))


async def test_what_a_response_returned_can_be_sent_back(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}|{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}|{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}]{% endfor %}{% if tools %}<tool_call>{% endif %}MARK"
    )
    async with saying(tmp_path, CALLS, template=template) as web, openai_client(web) as client:
        first = await client.responses.create(**ASK, tools=TOOLS)
        answers = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "42"}
            for item in first.output
            if item.type == "function_call"
        ]
        given = [
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            *(item.model_dump() for item in first.output),
            *answers,
        ]
        again = await client.responses.create(
            **{**ASK, "input": given}, tools=TOOLS, instructions="Be kind"
        )
        assert len(again.output) == 3
        prompt = (
            "[system|Be kind][user|Weather?]"
            f"[assistant|I look.|weather{JSON}|time{{}}][tool|42][tool|42]<tool_call>"
        )
        rendered = await web.ok(
            "/v1/chat/completions/render",
            {
                "model": BASE,
                "messages": _messages(given, "Be kind"),
                "tools": [WEATHER, TIME],
            },
        )
        assert rendered["prompt"].startswith(prompt)


def _messages(given: Any, instructions: str) -> list[dict[str, Any]]:
    from loraplex_gateway.responses.items import messages_of

    return messages_of(given, instructions)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"input": []}, "input"),
    ({"input": ["text"]}, "input[0]"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
    ({"input": [{"content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 1000}, "temperature"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"model": "nobody"}, "model"),
]


async def test_what_is_not_supported_is_refused_by_name(served: Web) -> None:
    for more, param in REFUSED:
        status = 404 if param == "model" else 400
        error = await served.refused(RESPONSES, {**ASK, **more}, status)
        assert error["param"] == param
        assert param in error["message"] or param == "model"


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    async with saying(tmp_path, "Hi") as web:
        yield web


async def test_nothing_is_stored(served: Web) -> None:
    found = await served.ok(RESPONSES, {**ASK, "store": True})
    answer = await served.get(f"{RESPONSES}/{found['id']}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "response_not_found"


async def test_fields_that_change_nothing(served: Web) -> None:
    more = {
        "background": False,
        "truncation": "disabled",
        "include": ["reasoning.encrypted_content"],
        "previous_response_id": None,
        "reasoning": {"summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "prompt_cache_key": "a",
        "user": "b",
        "max_tool_calls": 3,
    }
    assert (await served.ok(RESPONSES, {**ASK, **more}))["status"] == "completed"


async def test_an_empty_answer_is_one_empty_message(tmp_path: Path) -> None:
    async with saying(tmp_path, "") as web:
        (item,) = (await web.ok(RESPONSES, ASK))["output"]
        assert item["content"][0]["text"] == ""
        events = await events_of(web, ASK)
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


async def test_a_failure_in_the_middle_is_an_event(tmp_path: Path) -> None:
    options = {"crash_token": 10}
    async with saying(tmp_path, "well :)", engine=options) as web:
        events = await events_of(web, ASK)
        assert events[0]["type"] == "response.created"
        last = events[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert last["response"]["error"]["message"]


async def test_a_stream_that_cannot_begin_is_an_ordinary_error(served: Web) -> None:
    ask = {**ASK, "input": "a " * 3000, "stream": True}
    error = await served.refused(RESPONSES, ask, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
