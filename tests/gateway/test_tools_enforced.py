"""Calls that the server enforces, or forms that it enforces in place of calls or within them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gateway.harness import BASE
from gateway.scripted import openai_client, saying
from gateway.tool_texts import JSON, ONE_CALL, TIME, WEATHER
from openai import pydantic_function_tool
from pydantic import BaseModel

CHATS = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": BASE,
    "messages": [{"role": "user", "content": "Weather?"}],
    "tools": [WEATHER, TIME],
    "temperature": 0,
}


async def test_a_required_call_is_made_whatever_the_model_would_say(tmp_path: Path) -> None:
    async with saying(tmp_path, "I do not want to.") as web, openai_client(web) as client:
        ask = {**ASK, "max_tokens": 200, "tool_choice": "required", "parallel_tool_calls": False}
        found = await client.chat.completions.create(**ask)
        (choice,) = found.choices
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        if choice.finish_reason == "tool_calls":  # otherwise the text of an argument was too long
            assert isinstance(json.loads(call.function.arguments), dict)
        named = {"type": "function", "function": {"name": "time"}}
        found = await client.chat.completions.create(**{**ask, "tool_choice": named})
        (call,) = found.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("time", "{}")
        assert found.choices[0].finish_reason == "tool_calls"


async def test_a_required_call_in_a_stream(tmp_path: Path) -> None:
    text = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
    ask = {**ASK, "tool_choice": "required", "parallel_tool_calls": False}
    async with saying(tmp_path, text) as web:
        events = await web.events(CHATS, ask)
        deltas = [event["choices"][0]["delta"] for event in events]
        parts = [d["tool_calls"][0]["function"] for d in deltas if "tool_calls" in d]
        assert parts[0] == {"name": "weather", "arguments": ""}
        assert "".join(part["arguments"] for part in parts) == JSON
        assert not any(d.get("content") for d in deltas)
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_call_that_a_stop_string_cuts_off_is_not_announced_as_a_call(
    tmp_path: Path,
) -> None:
    """Programs read the arguments as JSON if `finish_reason` is tool_calls."""
    text = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
    stop = JSON[len(JSON) // 2 : len(JSON) // 2 + 3]
    ask = {**ASK, "tool_choice": "required", "parallel_tool_calls": False, "stop": [stop]}
    async with saying(tmp_path, text) as web:
        (choice,) = (await web.ok(CHATS, ask))["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["arguments"] == JSON[: JSON.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        last = (await web.events(CHATS, ask))[-1]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)
        tools = [{"type": "function", **tool["function"]} for tool in ASK["tools"]]
        body = {"model": BASE, "input": "Weather?", "tools": tools, "tool_choice": "required"}
        response = await web.ok("/v1/responses", {**body, "temperature": 0, "stop": [stop]})
        assert response["output"][-1]["status"] == "incomplete"


async def test_an_answer_by_a_schema_beside_tools(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for text, calls in (('{"sum": 12}', 0), (ONE_CALL["hermes"], 1)):
        async with saying(tmp_path, text) as web:
            (choice,) = (await web.ok(CHATS, {**ASK, "response_format": form}))["choices"]
            assert len(choice["message"].get("tool_calls", ())) == calls
            assert choice["message"]["content"] == (None if calls else text)


async def test_a_schema_that_cannot_be_enforced_is_the_fault_of_the_tools(tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "a", "parameters": parameters}}
    async with saying(tmp_path, "") as web:
        ask = {**ASK, "tools": [tool], "tool_choice": "required"}
        error = await web.refused(CHATS, ask, 400)
        assert error["param"] == "tools"


async def test_calls_of_strict_functions_are_valid_and_text_is_free(tmp_path: Path) -> None:
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (WEATHER, TIME)]
    for text in ("Sunny, I think: <b>!", "I look. " + ONE_CALL["hermes"]):
        async with saying(tmp_path, text) as web:
            (choice,) = (await web.ok(CHATS, {**ASK, "tools": tools}))["choices"]
            calls = choice["message"].get("tool_calls", [])
            assert [call["function"]["arguments"] for call in calls] == [JSON] * len(calls)
            assert len(calls) == text.count("<tool_call>")
            assert choice["message"]["content"] == ("I look." if calls else text)
    wrong = ONE_CALL["hermes"].replace("city", "town")
    async with saying(tmp_path, wrong) as web:
        ask = {**ASK, "tools": tools, "max_tokens": 64}
        (choice,) = (await web.ok(CHATS, ask))["choices"]
        assert "town" not in json.dumps(choice)


class Weather(BaseModel):
    """The weather in a town."""

    city: str
    days: list[int]


async def test_openais_client_parses_answers_and_calls(tmp_path: Path) -> None:
    meant = Weather(city="Oslo", days=[1, 2])
    said = '{"city": "Oslo", "days": [1, 2]}'
    ask: dict[str, Any] = {"model": BASE, "temperature": 0}
    async with saying(tmp_path, said) as web, openai_client(web) as client:
        response = await client.responses.parse(**ask, input="Weather?", text_format=Weather)
        assert response.output_parsed == meant
        chat = await client.chat.completions.parse(
            **ask, messages=ASK["messages"], response_format=Weather
        )
        assert chat.choices[0].message.parsed == meant
    call = f'<tool_call>\n{{"name": "Weather", "arguments": {said}}}\n</tool_call>'
    async with saying(tmp_path, call) as web, openai_client(web) as client:
        tool = pydantic_function_tool(Weather)
        chat = await client.chat.completions.parse(**ask, messages=ASK["messages"], tools=[tool])
        (made,) = chat.choices[0].message.tool_calls
        assert made.function.parsed_arguments == meant
        flat = {"type": "function", **tool["function"]}
        response = await client.responses.parse(**ask, input="Weather?", tools=[flat])
        (item,) = response.output
        assert item.parsed_arguments == {"city": "Oslo", "days": [1, 2]}


async def test_a_response_can_be_a_required_call(tmp_path: Path) -> None:
    flat = [{"type": "function", **tool["function"]} for tool in (WEATHER, TIME)]
    ask = {"model": BASE, "temperature": 0, "input": "Weather?", "tools": flat}
    async with saying(tmp_path, "No.") as web:
        choice = {"type": "function", "name": "time"}
        found = await web.ok("/v1/responses", {**ask, "tool_choice": choice})
        (item,) = found["output"]
        assert (item["name"], item["arguments"]) == ("time", "{}")
        assert found["tool_choice"] == choice
