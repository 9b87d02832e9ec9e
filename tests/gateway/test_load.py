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
