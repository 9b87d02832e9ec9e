"""Many callers at once, and servers that go away under them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway.harness import BASE, Web, error_of, gateway, web
from loraplex_gateway.places import CALLS_PER_CONNECTION, CallPlaces
from rpc.harness import CRASH, Running, running, until

TEXT = "/v1/completions"
SLOW = {"step_seconds": 0.01, "num_blocks": 8192, "max_context": 4096}
ASKED: dict[str, Any] = {
    "model": BASE, "prompt": [20, 21, 22], "temperature": 0, "ignore_eos": True,
}  # fmt: skip


@contextlib.asynccontextmanager
async def many(site: Web, most: int) -> Any:
    """A client with a connection for each of so many requests."""
    limits = httpx2.Limits(max_connections=most)
    async with httpx2.AsyncClient(
        base_url=site.url, limits=limits, timeout=120, trust_env=False
    ) as http:
        yield http


async def reads(http: httpx2.AsyncClient, seen: asyncio.Event, **fields: Any) -> list[Any]:
    """All events of a stream; `seen` is set at the first."""
    found = []
    async with http.stream("POST", TEXT, json={**ASKED, **fields, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                seen.set()
                found.append(line.removeprefix("data: "))
    return found


@pytest.mark.fault("clients-share-connection")
async def test_more_requests_run_than_one_connection_carries_and_health_is_answered(
    tmp_path: Path,
) -> None:
    count = 300
    async with (
        gateway(tmp_path, engine_options=SLOW, max_waiting=1000) as (up, site),
        many(site, count) as http,
    ):
        body = {**ASKED, "max_tokens": 400}
        tasks = [asyncio.create_task(http.post(TEXT, json=body)) for _ in range(count)]
        await until(lambda: up.metric("open_calls") >= count)
        assert (await site.get("/health")).status_code == 200
        assert (await site.get("/v1/models")).status_code == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: up.metric("open_calls") == 0)
        again = await site.ok(TEXT, {**ASKED, "max_tokens": 2})
        assert again["usage"]["completion_tokens"] == 2


@pytest.mark.fault("http-requests-wait")
async def test_requests_beyond_the_limit_are_refused_at_once_and_probes_are_answered(
    tmp_path: Path,
) -> None:
    options = {"engine_options": SLOW, "max_waiting": 1000, "web_max_requests": 3}
    async with gateway(tmp_path, **options) as (up, site), many(site, 20) as http:
        seen = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(reads(http, each, max_tokens=4000)) for each in seen]
        await asyncio.gather(*(each.wait() for each in seen))
        for stream in (False, True):
            answer = await site.post(TEXT, {**ASKED, "max_tokens": 1, "stream": stream})
            assert answer.status_code == 503
            error = error_of(answer)
            assert (error["code"], error["type"]) == ("overloaded", "service_unavailable_error")
            assert answer.headers["retry-after"] == "1"
        assert (await site.get("/v1/models")).status_code == 503
        assert (await site.get("/health")).status_code == 200
        assert (await site.get("/version")).status_code == 200
        series = (await site.get("/metrics")).text
        assert "loraplex_gateway_refused_requests_total 3.0" in series
        assert 'loraplex_gateway_places{state="taken"} 3.0' in series
        assert 'loraplex_gateway_places{state="free"} 0.0' in series
        tasks[0].cancel()
        await until(lambda: site.app_metric("loraplex_gateway_places", state="free") == 1)
        assert (await site.ok(TEXT, {**ASKED, "max_tokens": 1}))["choices"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: site.app_metric("loraplex_gateway_places", state="taken") == 0)
        await until(lambda: up.metric("open_calls") == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_leave_half_of_the_places_to_others(
    tmp_path: Path, stream: bool
) -> None:
    count, most = 12, 8
    options = {"engine_options": SLOW, "max_waiting": 1000, "web_max_requests": most}
    async with gateway(tmp_path, **options) as (up, site), many(site, 20) as http:
        body = {**ASKED, "prompt": [[20 + i, 21] for i in range(count)], "stream": stream}
        single = {**ASKED, "max_tokens": 2}
        alone = [
            (await site.ok(TEXT, {**single, "prompt": prompt}))["choices"][0]["text"]
            for prompt in body["prompt"]
        ]
        if stream:
            events = await site.events(TEXT, {**body, "max_tokens": 2})
            texts = [""] * count
            for choice in (choice for each in events for choice in each["choices"]):
                texts[choice["index"]] += choice["text"]
        else:
            whole = await site.ok(TEXT, {**body, "max_tokens": 2})
            texts = [each["text"] for each in whole["choices"]]
        assert texts == alone
        tasks = [
            asyncio.create_task(http.post(TEXT, json={**body, "max_tokens": 3000}))
            for _ in range(most // 2 + 1)
        ]
        taken = most // 2 + most // 2  # of the first, and one for each of the others
        await until(lambda: site.app_metric("loraplex_gateway_places", state="taken") == taken)
        assert up.metric("open_calls") <= taken
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: site.app_metric("loraplex_gateway_places", state="taken") == 0)


def test_places_are_spread_over_the_connections_and_none_has_too_many() -> None:
    places = CallPlaces(3 * CALLS_PER_CONNECTION + 1)
    scopes: list[Any] = [{} for _ in range(places.most + 5)]
    given = Counter(places.take(scope) for scope in scopes)
    assert given.pop(None) == 5
    assert given.keys() == set(range(4))
    assert max(given.values()) - min(given.values()) <= 1
    assert places.take(scopes[0]) in given  # the one that it has
    assert places.taken == places.most
    assert places.take_more(scopes[0], 5) == []
    for scope in scopes:
        places.give_back(scope)
        places.give_back(scope)
    assert places.taken == 0
    assert max(CallPlaces(1 << 16)._by_connection) == 0
    assert CallPlaces(1 << 16).connections * CALLS_PER_CONNECTION >= 1 << 16
    assert len(places.take_more({}, places.most)) == places.most // 2


async def test_all_of_many_streams_are_whole_and_the_same(tmp_path: Path) -> None:
    count = 280
    async with (
        gateway(tmp_path, engine_options={"num_blocks": 8192}, max_waiting=1000) as (up, site),
        many(site, count) as http,
    ):
        seen = asyncio.Event()
        found = await asyncio.gather(*(reads(http, seen, max_tokens=12) for _ in range(count)))
        texts = Counter(
            "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1])
            for events in found
        )
        assert len(texts) == 1
        assert all(events[-1] == "[DONE]" for events in found)
        assert site.app.state is not None
        assert up.metric("open_calls") == 0


async def test_a_lost_engine_ends_streams_with_an_error_and_later_requests_are_answered(
    tmp_path: Path,
) -> None:
    async with (
        gateway(tmp_path, engine_options=SLOW, max_waiting=100) as (up, site),
        many(site, 20) as http,
    ):
        starts = [asyncio.Event() for _ in range(8)]
        streams = [asyncio.create_task(reads(http, each, max_tokens=2000)) for each in starts]
        await asyncio.gather(*(each.wait() for each in starts))
        crash = await http.post(TEXT, json={**ASKED, "prompt": [20, CRASH], "max_tokens": 2})
        assert crash.status_code == 503
        assert error_of(crash)["code"] == "engine_restarted"
        assert "retry-after" in crash.headers
        for events in await asyncio.gather(*streams):
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["code"] == "engine_restarted"
        await until(lambda: up.metric("engine_ready") == 1)
        again = await site.ok(TEXT, {**ASKED, "max_tokens": 2})
        assert again["usage"]["completion_tokens"] == 2


async def test_a_server_that_is_replaced_under_streams_is_found_again(tmp_path: Path) -> None:
    settings = {"engine_options": SLOW, "max_waiting": 100, "drain_timeout": 0.0}
    first = running(tmp_path / "a", **settings)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    up: Running = await first.__aenter__()
    address = str(up.server.address)
    async with web(address, compared=False) as site, many(site, 20) as http:
        starts = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(reads(http, each, max_tokens=3000)) for each in starts]
        await asyncio.gather(*(each.wait() for each in starts))
        await first.__aexit__(None, None, None)
        for events in await asyncio.gather(*streams):
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["type"] == "service_unavailable_error"
        away = await site.post(TEXT, {**ASKED, "max_tokens": 2})
        assert away.status_code == 503
        assert "retry-after" in away.headers
        assert (await site.get("/health")).status_code == 503
        port = int(address.rpartition(":")[2])
        async with running(tmp_path / "b", **{**settings, "port": port}):
            while (await site.get("/health")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            back = await site.ok(TEXT, {**ASKED, "max_tokens": 2})
            assert back["usage"]["completion_tokens"] == 2
