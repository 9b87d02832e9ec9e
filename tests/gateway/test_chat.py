"""Chats over HTTP are the server's completions, whole and in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gateway.harness import BASE, Web, gateway, needs_option
from loraplex import AsyncClient
from rpc.harness import Running, expected

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "the quick brown fox"}], "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Running, Web]]:
    async with gateway(tmp_path_factory.mktemp("chat")) as (up, web):
        await up.register("one", 1)
        await up.register("two", 2)
        yield up, web


@pytest.fixture
def up(both: tuple[Running, Web]) -> Running:
    return both[0]


@pytest.fixture
def web(both: tuple[Running, Web]) -> Web:
    return both[1]


async def direct(up: Running, **options: Any) -> Any:
    """The same request through the client of gRPC."""
    async with AsyncClient(str(up.server.address), key="") as client:
        given = {
            "messages": ASKED["messages"],
            "temperature": 0.0,
            "add_generation_prompt": True,
            "continue_final_message": False,
            **options,
        }
        return await client.generate(**given)


@pytest.mark.parametrize("model", [BASE, "one", "two@1", f"{BASE}:two"])
async def test_an_answer_is_the_servers_for_the_model(up: Running, web: Web, model: str) -> None:
    adapter = model.removeprefix(BASE).removeprefix(":")
    wanted = await direct(up, adapter=adapter or None, max_new_tokens=9)
    answer = await web.post(PATH, {**ASKED, "model": model, "max_tokens": 9})
    found = answer.json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["index"] == 0
    assert found["object"] == "chat.completion"
    assert found["model"] == model
    assert found["usage"] == {
        "prompt_tokens": wanted.usage.prompt_tokens,
        "completion_tokens": 9,
        "total_tokens": wanted.usage.prompt_tokens + 9,
        "prompt_tokens_details": found["usage"]["prompt_tokens_details"],
    }
    shown = answer.headers.get("x-loraplex-adapter")
    if not adapter:
        assert shown is None
    else:
        (served,) = wanted.adapters
        assert shown == f"{served.name}@1 {served.digest}"


async def test_an_answer_goes_on_as_long_as_the_context_allows(web: Web) -> None:
    found = await web.ok(PATH, {**ASKED, "model": BASE})
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == 256  # the oracle's context


async def test_max_completion_tokens_comes_before_max_tokens(web: Web) -> None:
    body = {**ASKED, "model": BASE, "max_completion_tokens": 3, "max_tokens": 7}
    assert (await web.ok(PATH, body))["usage"]["completion_tokens"] == 3
    for name in ("max_completion_tokens", "max_tokens"):
        error = await web.refused(PATH, {**ASKED, "model": BASE, name: 0}, 400)
        assert error["param"] == name


def content(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(
        choice["delta"].get("content", "")
        for each in events
        for choice in each["choices"]
        if choice["index"] == index
    )


async def test_a_stream_is_the_whole_answer_in_parts(web: Web) -> None:
    body = {**ASKED, "model": "one", "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    whole = await web.ok(PATH, body)
    events = await web.events(PATH, body)
    assert content(events) == whole["choices"][0]["message"]["content"]
    first, *_, last = (each["choices"][0] for each in events)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert last["delta"] == {}
    assert last["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(each["choices"][0]["finish_reason"] is None for each in events[:-1])
    scored = [
        token
        for each in events
        for token in (each["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert scored == whole["choices"][0]["logprobs"]["content"]
    assert len({(each["id"], each["created"], each["object"]) for each in events}) == 1
    assert events[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in each for each in events)


async def test_usage_comes_at_the_end_or_always_and_only_on_request(web: Web) -> None:
    body = {**ASKED, "model": BASE, "max_tokens": 12}
    whole = (await web.ok(PATH, body))["usage"]
    events = await web.events(PATH, {**body, "stream_options": {"include_usage": True}})
    *parts, last = events
    assert last["choices"] == []
    assert {**last["usage"], "prompt_tokens_details": 0} == {**whole, "prompt_tokens_details": 0}
    assert all(each["usage"] is None and each["choices"] for each in parts)
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await web.events(PATH, {**body, "stream_options": options})
    counts = [each["usage"]["completion_tokens"] for each in events]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert all(each["usage"]["prompt_tokens"] == whole["prompt_tokens"] for each in events)
    error = await web.refused(PATH, {**body, "stream_options": {"include_usage": True}}, 400)
    assert error["param"] == "stream_options"


async def test_log_probabilities_are_the_servers(up: Running, web: Web) -> None:
    wanted = await direct(up, adapter="one", max_new_tokens=6, logprobs=2)
    body = {**ASKED, "model": "one", "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    found = (await web.ok(PATH, body))["choices"][0]["logprobs"]
    assert found["refusal"] is None
    for token, entry in zip(found["content"], wanted.logprobs, strict=True):
        assert token["token"] == entry.chosen.text
        assert token["logprob"] == entry.chosen.logprob
        assert [each["logprob"] for each in token["top_logprobs"]] == [
            each.logprob for each in entry.top
        ]
        if "\ufffd" not in token["token"]:
            assert bytes(token["bytes"]).decode() == token["token"]
    body = {**ASKED, "model": "one", "max_tokens": 2, "logprobs": True}
    found = (await web.ok(PATH, body))["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in found] == [[], []]
    assert (await web.ok(PATH, {**body, "logprobs": False}))["choices"][0]["logprobs"] is None


async def test_a_stop_string_and_a_stop_token_are_told(up: Running, web: Web) -> None:
    wanted = await direct(up, max_new_tokens=12)
    body = {**ASKED, "model": BASE, "max_tokens": 12}
    token = wanted.token_ids[4]
    found = (await web.ok(PATH, {**body, "stop_token_ids": [token]}))["choices"][0]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", token)
    ending = wanted.text[2:5]
    for stop in (ending, ["not there", ending]):
        found = (await web.ok(PATH, {**body, "stop": stop}))["choices"][0]
        assert (found["finish_reason"], found["stop_reason"]) == ("stop", ending)
        assert found["message"]["content"] == wanted.text[: wanted.text.index(ending)]
        events = await web.events(PATH, {**body, "stop": stop})
        assert content(events) == found["message"]["content"]
        assert events[-1]["choices"][0]["stop_reason"] == ending
    for nothing in ("", []):
        found = (await web.ok(PATH, {**body, "stop": nothing}))["choices"][0]
        assert found["message"]["content"] == wanted.text


async def test_the_same_seed_gives_the_same_answer_also_if_it_is_negative(
    up: Running, web: Web
) -> None:
    body = {"messages": ASKED["messages"], "model": BASE, "max_tokens": 8, "temperature": 50}
    wanted = await direct(up, max_new_tokens=8, temperature=50.0, seed=2**64 - 7)
    for _ in range(2):
        found = await web.ok(PATH, {**body, "seed": -7})
        assert found["choices"][0]["message"]["content"] == wanted.text
    other = await web.ok(PATH, {**body, "seed": 7})
    assert other["choices"][0]["message"]["content"] != wanted.text
    for seed in (2**64, -(2**63) - 1):
        assert (await web.refused(PATH, {**body, "seed": seed}, 400))["param"] == "seed"


async def test_a_mix_is_computed_with_its_weights(up: Running, web: Web) -> None:
    wanted = await direct(up, mix={"one": 0.5, "two@1": None}, max_new_tokens=7)
    mix = [{"adapter": "one", "weight": 0.5}, {"adapter": f"{BASE}:two@1"}]
    answer = await web.post(
        PATH, {**ASKED, "model": BASE, "max_tokens": 7, "loraplex": {"mix": mix}}
    )
    assert answer.json()["choices"][0]["message"]["content"] == wanted.text
    first, second = answer.headers["x-loraplex-adapter"].split(", ")
    assert first == f"one@1 {wanted.adapters[0].digest};weight=0.5"
    assert second == f"two@1 {wanted.adapters[1].digest};weight=1"
    for bad, param in (
        ({"model": "one", "loraplex": {"mix": mix}}, "loraplex.mix"),
        ({"loraplex": {"mix": [{"adapter": BASE}]}}, "loraplex.mix[0].adapter"),
        ({"loraplex": {"mix": [*mix, mix[0]]}}, "loraplex.mix[2].adapter"),
        ({"loraplex": {"mix": [{"adapter": "one", "weight": 99}]}}, "loraplex.mix[0].weight"),
        ({"loraplex": {"mix": [{"weight": 1}]}}, "loraplex.mix[0].adapter"),
        ({"loraplex": {"blend": 1}}, "loraplex.blend"),
    ):
        error = await web.refused(PATH, {**ASKED, "model": BASE, **bad}, 400)
        assert error["param"] == param
    absent = {"mix": [{"adapter": "nobody"}]}
    error = await web.refused(PATH, {**ASKED, "model": BASE, "loraplex": absent}, 404)
    assert error["code"] == "model_not_found"


def text(value: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": value}


async def test_messages_of_every_role_and_in_parts_are_rendered(web: Web) -> None:
    talk = [
        {"role": "system", "content": [text("be "), text("kind")]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
    ]
    found = await web.ok(PATH + "/render", {"model": BASE, "messages": talk})
    assert found["prompt"] == "<system>be \nkind<user>hi<assistant>yes<user>go on<assistant>"
    assert found["count"] == len(found["token_ids"])
    used = await web.ok(PATH, {"model": BASE, "messages": talk, "max_tokens": 1})
    assert used["usage"]["prompt_tokens"] == found["count"]


async def test_an_answer_of_the_assistant_can_be_continued(up: Running, web: Web) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the quick"}]
    body = {"model": BASE, "messages": talk, "max_tokens": 5, "temperature": 0}
    continued = await web.ok(PATH, {**body, "continue_final_message": True})
    wanted = await direct(
        up,
        messages=talk,
        continue_final_message=True,
        add_generation_prompt=False,
        max_new_tokens=5,
    )
    assert continued["choices"][0]["message"]["content"] == wanted.text
    again = await web.ok(PATH, body)
    assert again["choices"][0]["message"]["content"] != wanted.text
    both = {**body, "continue_final_message": True, "add_generation_prompt": True}
    assert (await web.refused(PATH, both, 400))["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "no role"}, "messages[0].role"),
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0]"),
        ({"role": "user", "content": 7}, "messages[0].content"),
        ({"role": "user", "content": [7]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": "x", "colour": "red"}, "messages[0]"),
        ("hello", "messages[0]"),
    ],
)
async def test_what_is_wrong_with_a_message_is_named(web: Web, message: Any, param: str) -> None:
    error = await web.refused(PATH, {"model": BASE, "messages": [message]}, 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


async def test_the_tokens_of_prompt_and_answer_are_shown_on_request(up: Running, web: Web) -> None:
    needs_option("return_prompt_token_ids")
    wanted = await direct(up, max_new_tokens=5)
    body = {**ASKED, "model": BASE, "max_tokens": 5, "return_token_ids": True}
    render = await web.ok(PATH + "/render", {**ASKED, "model": BASE})
    found = await web.ok(PATH, body)
    assert found["choices"][0]["token_ids"] == list(wanted.token_ids)
    assert found["prompt_token_ids"] == render["token_ids"]
    events = await web.events(PATH, body)
    assert events[0]["prompt_token_ids"] == render["token_ids"]
    tokens = [t for each in events for t in each["choices"][0].get("token_ids", [])]
    assert tokens == list(wanted.token_ids)
    assert tokens == expected(render["token_ids"], 5)
    as_ids = {**body, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    scored = (await web.ok(PATH, as_ids))["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in scored] == [f"token_id:{t}" for t in wanted.token_ids]


async def test_several_answers_are_those_of_several_seeds(up: Running, web: Web) -> None:
    needs_option("n")
    body = {"messages": ASKED["messages"], "model": "one", "temperature": 30, "max_tokens": 6}
    alone = [
        (await web.ok(PATH, {**body, "seed": 5 + i}))["choices"][0]["message"]["content"]
        for i in range(3)
    ]
    several = await web.ok(PATH, {**body, "seed": 5, "n": 3})
    assert [each["index"] for each in several["choices"]] == [0, 1, 2]
    assert [each["message"]["content"] for each in several["choices"]] == alone
    assert several["usage"]["completion_tokens"] == 18
    options = {"include_usage": True}
    events = await web.events(PATH, {**body, "seed": 5, "n": 3, "stream_options": options})
    assert [content(events, i) for i in range(3)] == alone
    assert events[-1]["usage"]["completion_tokens"] == 18
    reasons = [
        choice["index"]
        for each in events
        for choice in each["choices"]
        if choice["finish_reason"] == "length"
    ]
    assert sorted(reasons) == [0, 1, 2]
    for n in (0, -1, 129):
        assert (await web.refused(PATH, {**body, "n": n}, 400))["param"] == "n"
