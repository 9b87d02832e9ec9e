"""Calls of functions in chats, as OpenAI's own client sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gateway.harness import BASE
from gateway.scripted import TEMPLATE, openai_client, saying
from gateway.tool_texts import JSON, ONE_CALL, TIME, WEATHER

USER = [{"role": "user", "content": "Weather?"}]
ASK: dict[str, Any] = {
    "model": BASE,
    "messages": USER,
    "tools": [WEATHER, TIME],
    "temperature": 0,
}
CHATS = "/v1/chat/completions"
TWO = "I look.\n" + ONE_CALL["hermes"] + '\n<tool_call>{"name": "time"}</tool_call>'


async def test_an_answer_has_the_calls_that_the_model_wrote(tmp_path: Path) -> None:
    async with saying(tmp_path, TWO) as web, openai_client(web) as client:
        found = await client.chat.completions.create(**ASK)
        (choice,) = found.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        weather, time = choice.message.tool_calls
        assert (weather.type, weather.function.name) == ("function", "weather")
        assert weather.function.arguments == JSON
        assert (time.function.name, time.function.arguments) == ("time", "{}")
        assert weather.id != time.id
        alone = await client.chat.completions.create(**ASK, parallel_tool_calls=False)
        assert len(alone.choices[0].message.tool_calls) == 1


async def test_a_stream_has_the_same_calls_in_parts(tmp_path: Path) -> None:
    async with saying(tmp_path, TWO) as web:
        whole = (await web.ok(CHATS, ASK))["choices"][0]
        events = await web.events(CHATS, ASK)
        assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text, calls = "", {}
        for each in events[1:-1]:
            delta = each["choices"][0]["delta"]
            text += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] not in calls
                    assert call["function"]["arguments"] == ""
                    calls[call["index"]] = call
                else:
                    function = calls[call["index"]]["function"]
                    function["arguments"] += call["function"]["arguments"]
        last = events[-1]["choices"][0]
        assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
        assert text == whole["message"]["content"]
        without = [{**call, "id": ""} for call in whole["message"]["tool_calls"]]
        assert [
            {"id": "", "type": c["type"], "function": c["function"]} for c in calls.values()
        ] == without


async def test_openais_client_joins_the_parts_of_a_stream(tmp_path: Path) -> None:
    async with saying(tmp_path, TWO) as web, openai_client(web) as client:
        async with client.chat.completions.stream(**ASK) as stream:
            kinds = {event.type async for event in stream}
            found = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        names = [call.function.name for call in found.choices[0].message.tool_calls]
        assert names == ["weather", "time"]


async def test_an_answer_that_calls_nothing_is_text(tmp_path: Path) -> None:
    for text in ("Sunny!", '<tool_call>{"name": "nobody"}</tool_call>', "a <tool_call>b"):
        async with saying(tmp_path, text) as web:
            (choice,) = (await web.ok(CHATS, ASK))["choices"]
            assert choice["message"]["content"] == text
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == "stop"


async def test_a_call_that_is_cut_off_is_text(tmp_path: Path) -> None:
    async with saying(tmp_path, ONE_CALL["hermes"]) as web:
        (choice,) = (await web.ok(CHATS, {**ASK, "max_tokens": 20}))["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"].startswith('<tool_call>\n{"name"')


async def test_without_tools_nothing_is_read_as_a_call(tmp_path: Path) -> None:
    async with saying(tmp_path, ONE_CALL["hermes"]) as web:
        for body in ({**ASK, "tool_choice": "none"}, {**ASK, "tools": []}):
            (choice,) = (await web.ok(CHATS, body))["choices"]
            assert choice["message"]["content"] == ONE_CALL["hermes"]
        rendered = await web.ok(f"{CHATS}/render", {**ASK, "tool_choice": "none"})
        assert "<tools>" not in rendered["prompt"]


async def test_the_template_gets_the_functions_and_earlier_calls(tmp_path: Path) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
    ]
    async with saying(tmp_path, "Noon.") as web:
        rendered = await web.ok(f"{CHATS}/render", {**ASK, "messages": messages})
        assert '"description": "The weather in a town"' in rendered["prompt"]
        assert '<tool_call>{"name": "time", "arguments": {}}</tool_call>' in rendered["prompt"]
        assert "<tool>12:00" in rendered["prompt"]
        found = await web.ok(CHATS, {**ASK, "messages": messages})
        assert found["choices"][0]["message"]["content"] == "Noon."


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"functions": [{"name": "weather"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
]


async def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    async with saying(tmp_path, "") as web:
        for more, param in REFUSED:
            error = await web.refused(CHATS, {**ASK, **more}, 400)
            assert error["param"] == param


async def test_a_template_that_does_not_tell_how_calls_are_written(tmp_path: Path) -> None:
    silent = TEMPLATE.replace("<tool_call>", "<c>").replace("</tool_call>", "</c>")
    async with saying(tmp_path, ONE_CALL["olmo3"], template=silent) as web:
        error = await web.refused(CHATS, ASK, 400)
        assert error["param"] == "tools"
        assert "tool_format" in error["message"]
    async with saying(tmp_path, ONE_CALL["olmo3"], template=silent, web_tool_format="olmo3") as web:
        (choice,) = (await web.ok(CHATS, ASK))["choices"]
        assert json.loads(
            choice["message"]["tool_calls"][0]["function"]["arguments"]
        ) == json.loads(JSON)


async def test_a_template_without_tools_is_named(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}MARK"
    async with saying(tmp_path, "", template=plain) as web:
        error = await web.refused(CHATS, ASK, 400)
        assert error["param"] == "tools"
        assert "does not read tools" in error["message"]
