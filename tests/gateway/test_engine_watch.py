"""The state of the batch over HTTP: what it counts, for whom, and when it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from gateway.harness import BASE, Web, error_of, gateway, web
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.access.roles import Role
from rpc.harness import until, write_adapter
from security.callers import OPS, Callers, guarded, principal, register

WATCH = "/v1/engine/watch"
SLOW = {"step_seconds": 0.02, "num_blocks": 4096, "max_context": 4096}
TALK = [{"role": "user", "content": "hi"}]


async def states(found: Web, caller: str = "", interval: float = 0.1) -> AsyncIterator[Any]:
    headers = {"authorization": f"Bearer {caller}"} if caller else {}
    query = {"interval": interval}
    async with found.http.stream("GET", WATCH, params=query, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


async def rows_until(found: Web, wanted: set[str], caller: str = "") -> dict[str, Any]:
    """The first state in which exactly these adapters have requests."""
    async with aclosing(states(found, caller)) as watch:  # type: ignore[type-var]
        async for state in watch:
            if {entry["adapter"] for entry in state["adapters"]} == wanted:
                return dict(state)
    raise AssertionError("the stream has ended")


def talk(found: Web, model: str, caller: str = "") -> asyncio.Task[Any]:
    body = {"model": model, "messages": TALK, "max_tokens": 400, "ignore_eos": True}
    return asyncio.create_task(found.post("/v1/chat/completions", body, key=caller))


async def end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_requests_are_counted_by_adapter_and_gone_when_they_end(tmp_path: Path) -> None:
    async with gateway(tmp_path, engine_options=SLOW) as (up, found):
        write_adapter(up.folder / "import" / "one")
        await up.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="one", path="one"))
        tasks = [talk(found, BASE), talk(found, "one"), talk(found, "one")]
        state = await rows_until(found, {"", "one@1"})
        entries = {entry["adapter"]: entry for entry in state["adapters"]}
        assert not any(entry["hidden"] for entry in entries.values())
        assert state["object"] == "engine.state"
        assert state["kv_blocks_used"] <= state["kv_blocks"] == SLOW["num_blocks"]
        assert state["max_rows"] > 0
        await end(*tasks)
        after = await rows_until(found, set())
        assert after["steps"] >= state["steps"]
        assert after["generated_tokens"] >= state["generated_tokens"]
        assert after["resident_adapters"] == 1


async def test_another_principals_requests_are_one_entry_without_a_name(tmp_path: Path) -> None:
    red, blind = principal("red", adapters="team=red"), principal("blind", [Role.INFER])
    callers = Callers(principal(OPS), red, blind)
    with pytest.MonkeyPatch.context() as patch:
        async with (
            guarded(tmp_path, patch, callers, engine_options=SLOW) as up,
            web(str(up.server.address)) as found,
        ):
            await register(up, OPS, "secret-name", 1)
            task = talk(found, "secret-name", OPS)
            await rows_until(found, {"secret-name@1"}, OPS)
            async with aclosing(states(found, "red")) as watch:  # type: ignore[type-var]
                state = await anext(watch)
            assert "secret-name" not in json.dumps(state)
            assert [entry["hidden"] for entry in state["adapters"]] == [True]
            await end(task)
            for caller, status in (("", 401), ("nonsense", 401), ("blind", 403)):
                answer = await found.get(WATCH, caller)
                assert answer.status_code == status
                error_of(answer)


@pytest.mark.parametrize("interval", ["0.01", "61", "-1", "nan", "inf", "soon", "1e400", "0x1"])
async def test_an_interval_that_makes_no_sense_is_refused_by_name(interval: str) -> None:
    async with web("127.0.0.1:1") as found:
        answer = await found.http.get(WATCH, params={"interval": interval})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "interval"


async def test_the_servers_watch_ends_when_the_reader_leaves(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (up, found):
        async with aclosing(states(found)) as watch:  # type: ignore[type-var]
            await anext(watch)
            assert up.metric("open_calls") == 1
        await until(lambda: up.metric("open_calls") == 0)


async def test_a_server_that_is_away_is_said_to_be_away() -> None:
    async with web("127.0.0.1:1") as found:
        answer = await found.get(WATCH)
        assert answer.status_code == 503
        error_of(answer)
