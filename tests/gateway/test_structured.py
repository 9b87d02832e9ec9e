"""The form of an answer, asked for in any client's way, is kept by the server."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web, gateway
from rpc.harness import HARMLESS

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SCHEMA = {"enum": [{"a": 1}, {"b": [True, None]}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def web(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Web]:
    options = {"num_blocks": 512, **HARMLESS}
    async with gateway(tmp_path_factory.mktemp("structured"), engine_options=options) as (_, found):
        yield found


def body(path: str, **fields: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": BASE, "max_tokens": 120, "temperature": 0, **fields}
    if path == CHAT:
        return {**asked, "messages": [{"role": "user", "content": "hi"}]}
    return {**asked, "prompt": "hi"}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            lambda text: json.loads(text) in SCHEMA["enum"],
        ),
        ({"guided_json": SCHEMA}, lambda text: json.loads(text) in SCHEMA["enum"]),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA)}},
            lambda text: json.loads(text) in SCHEMA["enum"],
        ),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}.__contains__),
        ({"guided_choice": ["äh", "öh"]}, {"äh", "öh"}.__contains__),
        ({"guided_regex": "[0-9]{3}-x"}, re.compile("[0-9]{3}-x").fullmatch),
        ({"ebnf": 'root ::= "a" | "b"'}, {"a", "b"}.__contains__),
        ({"grammar": 'start: "c" "d"'}, "cd".__eq__),
    ],
)
async def test_an_answer_has_the_form_that_is_asked_for(
    web: Web, path: str, fields: dict[str, Any], holds: Any
) -> None:
    (choice,) = (await web.ok(path, body(path, **fields)))["choices"]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert choice["finish_reason"] == "stop"
    assert holds(text), text
    events = await web.events(path, body(path, **fields))
    parts = [each["choices"][0] for each in events]
    assert text == "".join(
        part["delta"].get("content", "") if path == CHAT else part["text"] for part in parts
    )


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"json_schema": '{"type": 7}'}, "json_schema"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": 7}}},
            "response_format.schema",
        ),
    ],
)
async def test_a_form_that_cannot_be_kept_is_refused_by_the_field_that_asked_for_it(
    web: Web, path: str, fields: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        error = await web.refused(path, body(path, stream=stream, **fields), 400)
        assert (error["param"] or "").startswith(param)
        assert "structured_output." not in error["message"]


LETTERS = {"guided_regex": "[a-c]{2,40}"}


def texts(path: str, choices: list[Any]) -> list[str]:
    """The texts of the choices in their order."""
    ordered = sorted(choices, key=lambda each: each["index"])
    return [each["message"]["content"] if path == CHAT else each["text"] for each in ordered]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_each_of_several_choices_has_the_form_and_its_own_seed(web: Web, path: str) -> None:
    given = {**LETTERS, "n": 3, "temperature": 1.5, "seed": 7}
    found = await web.ok(path, body(path, **given))
    several = texts(path, found["choices"])
    assert all(re.fullmatch("[a-c]{2,40}", text) for text in several)
    assert len({*several}) == 3
    assert {each["finish_reason"] for each in found["choices"]} == {"stop"}
    assert texts(path, (await web.ok(path, body(path, **given)))["choices"]) == several
    for i, text in enumerate(several):
        single = await web.ok(path, body(path, **{**given, "n": 1, "seed": 7 + i}))
        assert texts(path, single["choices"]) == [text]
    parts = [""] * 3
    for event in await web.events(path, body(path, **given)):
        for choice in event["choices"]:
            said = choice["delta"].get("content", "") if path == CHAT else choice["text"]
            parts[choice["index"]] += said
    assert parts == several


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_form_wins_over_the_least_length_and_the_largest_length_over_the_form(
    web: Web, path: str
) -> None:
    drawn = {"n": 3, "temperature": 1.5, "seed": 7, "return_token_ids": True}
    asked = body(path, **drawn, **LETTERS, min_tokens=30)
    for choice in (await web.ok(path, asked))["choices"]:
        assert (len(choice["token_ids"]) >= 30, choice["finish_reason"]) == (True, "stop")
    asked = body(path, **drawn, guided_choice=["yes", "no"], min_tokens=100)
    found = await web.ok(path, asked)
    assert {*texts(path, found["choices"])} <= {"yes", "no"}
    assert {each["finish_reason"] for each in found["choices"]} == {"stop"}
    assert {each["stop_reason"] for each in found["choices"]} == {None}
    asked = body(path, **{**drawn, **LETTERS, "max_tokens": 3, "min_tokens": 3})
    for choice in (await web.ok(path, asked))["choices"]:
        assert (len(choice["token_ids"]), choice["finish_reason"]) == (3, "length")
