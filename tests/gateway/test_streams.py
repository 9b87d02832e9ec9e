"""Streams of events: gone clients end the work, silence is filled, sources end with readers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import BASE, Web, gateway
from loraplex_gateway.errors import ApiError
from loraplex_gateway.wire import events
from loraplex_gateway.wire.events import EventStream, event
from loraplex_gateway.wire.merging import all_of, merged
from rpc.harness import FORBIDDEN, Running, until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SLOW = {"step_seconds": 0.02, "num_blocks": 4096}
TALK = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def slow(folder: Path) -> AsyncIterator[tuple[Running, Web]]:
    async with gateway(folder, engine_options={**SLOW, "max_context": 4096}) as both:
        yield both


async def raw(web: Web, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a connection of its own, which the test can close when it likes."""
    host, _, port = web.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        (CHAT, {"messages": TALK, "stream": True}, 1),
        (CHAT, {"messages": TALK}, 1),
        (TEXT, {"prompt": ["a", "b", "c"], "max_tokens": 4000, "stream": True}, 3),
        (TEXT, {"prompt": ["a", "b", "c"], "max_tokens": 4000}, 3),
    ],
    ids=["chat stream", "chat", "text stream", "text"],
)
async def test_a_client_that_goes_away_ends_its_requests_on_the_server(
    tmp_path: Path, path: str, body: dict[str, Any], requests: int
) -> None:
    async with slow(tmp_path) as (up, web):
        reader, writer = await raw(web, path, {"model": BASE, "temperature": 0, **body})
        await until(lambda: up.metric("running_requests") == requests)
        if body.get("stream"):
            await reader.readuntil(b"data: ")
        writer.close()
        await until(lambda: up.metric("running_requests") == 0)
        # Not because they were done:
        assert up.metric("generated_tokens_total") < requests * 4000
        series = (await web.get("/metrics")).text
        assert "loraplex_gateway_open_streams 0.0" in series
        assert "loraplex_gateway_running_requests 1.0" in series  # this one


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the quick"}]}),
        ("/v1/completions", {"prompt": "the quick"}),
    ],
)
async def test_the_end_of_a_choice_is_told_when_the_choice_ends(
    tmp_path: Path, path: str, asked: dict[str, Any]
) -> None:
    async with slow(tmp_path) as (_, web):
        body = {
            **asked, "model": BASE, "temperature": 30, "seed": 5, "n": 3, "max_tokens": 30,
            "return_token_ids": True, "logit_bias": dict.fromkeys(map(str, FORBIDDEN), -100),
        }  # fmt: skip
        first, *others = [each["token_ids"] for each in (await web.ok(path, body))["choices"]]
        stop = next(token for token in first[1:6] if all(token not in other for other in others))
        body = {**body, "stop_token_ids": [stop], "stream_options": {"include_usage": True}}
        events = await web.events(path, body)
        whole = await web.ok(path, {k: v for k, v in body.items() if k != "stream_options"})
    *choices, last = [(each["choices"] or [None])[0] for each in events]
    assert last is None
    ends = {each["index"]: i for i, each in enumerate(choices) if each["finish_reason"]}
    assert len(ends) == 3
    for index, end in ends.items():
        assert choices[end]["finish_reason"] == whole["choices"][index]["finish_reason"]
        assert choices[end]["stop_reason"] == whole["choices"][index]["stop_reason"]
        assert all(each["index"] != index for each in choices[end + 1 :])
        tokens = [
            t for each in choices if each["index"] == index for t in each.get("token_ids", ())
        ]
        assert tokens == whole["choices"][index]["token_ids"]
    assert choices[ends[0]]["stop_reason"] == stop
    after = [each for each in choices[ends[0] + 1 :] if not each["finish_reason"]]
    assert {each["index"] for each in after} == {1, 2}  # which go on


def app_of(source: Any, **given: Any) -> Any:
    stream = EventStream(source, **given)

    async def run(messages: list[dict[str, Any]], until_gone: asyncio.Event | None = None) -> None:
        async def receive() -> dict[str, Any]:
            await (until_gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)

        await stream({"type": "http", "method": "POST"}, receive, send)

    return run


def body_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


async def test_silence_is_filled_with_comments_also_before_the_first_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.05)
    go = asyncio.Event()
    messages: list[dict[str, Any]] = []

    async def source() -> AsyncGenerator[bytes, None]:
        await go.wait()
        go.clear()
        yield event(1)
        await go.wait()
        yield event(2)

    running = asyncio.create_task(app_of(source(), headers={"x-a": "b"})(messages))
    await until(lambda: body_of(messages).count(events.PING) >= 2)
    go.set()
    await until(lambda: b"data: 1" in body_of(messages))
    seen = body_of(messages).count(events.PING)
    await until(lambda: body_of(messages).count(events.PING) >= seen + 2)
    go.set()
    await running
    rest = body_of(messages).replace(events.PING, b"")
    assert rest == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert [m["type"] for m in messages].count("http.response.start") == 1
    assert (b"x-a", b"b") in messages[0]["headers"]
    assert messages[-1]["more_body"] is False


async def test_a_failure_before_the_first_event_is_an_ordinary_error() -> None:
    async def source() -> AsyncGenerator[bytes, None]:
        raise ApiError(418, "short and stout")
        yield b""

    messages: list[dict[str, Any]] = []
    await app_of(source())(messages)
    assert messages[0]["status"] == 418
    assert json.loads(body_of(messages))["error"]["message"] == "short and stout"


async def test_a_fault_in_a_stream_says_nothing_of_its_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def source() -> AsyncGenerator[bytes, None]:
        yield event(1)
        raise ValueError("".join(["a sec", "ret"]))  # the log shows lines of code

    messages: list[dict[str, Any]] = []
    await app_of(source())(messages)
    assert b"internal error of the gateway" in body_of(messages)
    assert body_of(messages).endswith(events.DONE)
    assert b"secret" not in body_of(messages)
    assert "secret" not in caplog.text
    assert "ValueError" in caplog.text


async def test_the_source_ends_with_its_reader_wherever_it_is() -> None:
    for waits in (True, False):
        ended, gone = asyncio.Event(), asyncio.Event()

        async def source(waits: bool = waits, ended: asyncio.Event = ended) -> Any:
            try:
                while True:
                    yield event(1)
                    await asyncio.sleep(3600 if waits else 0)
            finally:
                ended.set()

        messages: list[dict[str, Any]] = []
        running = asyncio.create_task(app_of(source())(messages, gone))
        needed = 2 if waits else 3
        await until(lambda messages=messages, needed=needed: len(messages) >= needed)
        gone.set()
        await running
        assert ended.is_set()


async def numbers(start: int, count: int, log: list[int]) -> AsyncGenerator[int, None]:
    try:
        for i in range(start, start + count):
            await asyncio.sleep(0)
            yield i
    finally:
        log.append(start)


@pytest.mark.parametrize("at_once", [1, 3, 64])
async def test_merged_sources_lose_nothing_and_keep_their_order(at_once: int) -> None:
    ended: list[int] = []
    sources = [numbers(1000 * i, 200, ended) for i in range(5)]
    found = [each async for each in merged(sources, at_once)]
    for i in range(5):
        assert [n for n in found if n // 1000 == i] == list(range(1000 * i, 1000 * i + 200))
    assert len(found) == 1000
    assert sorted(ended) == [0, 1000, 2000, 3000, 4000]


async def test_the_first_error_ends_all_merged_sources() -> None:
    ended: list[int] = []

    async def failing() -> AsyncGenerator[int, None]:
        yield -1
        raise ApiError(400, "no")

    sources = [numbers(0, 10**9, ended), failing(), numbers(1000, 10**9, ended)]
    with pytest.raises(ApiError):
        async for _ in merged(sources):
            pass
    assert sorted(ended) == [0, 1000]


async def test_a_reader_that_stops_ends_all_merged_sources() -> None:
    ended: list[int] = []
    source = merged([numbers(0, 10**9, ended), numbers(1000, 10**9, ended)])
    async for _ in source:
        break
    await source.aclose()
    assert sorted(ended) == [0, 1000]


async def test_the_first_error_cancels_the_other_work() -> None:
    cancelled = asyncio.Event()

    async def for_ever() -> int:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return 1

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ApiError(400, "no")

    with pytest.raises(ApiError):
        await all_of([asyncio.ensure_future(for_ever()), asyncio.ensure_future(fails())])
    assert cancelled.is_set()
