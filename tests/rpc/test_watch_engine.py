"""WatchEngine: the batch by adapter, as its caller may see it, in the newest state."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.v1 import engine_pb2 as pb
from loraplex.v1 import engine_pb2_grpc
from loraplex_server.access.principals import EVERYBODY, set_caller
from loraplex_server.access.roles import METHOD_ROLES, Role
from loraplex_server.rpc.services.live import engine as live
from loraplex_server.rpc.services.live.in_flight import InFlight
from rpc.harness import Running, ask, expected, refusal, running, streamed
from rpc.tenants import Tenants, _Stub, tenant, tenants

SLOW = {"step_seconds": 0.01, "num_blocks": 1024}
FAST = pb.WatchEngineRequest(interval={"nanos": 100_000_000})
PROMPT = (20, 21, 22)


def stub(up: Running) -> Any:
    return engine_pb2_grpc.EngineServiceStub(up.channel)


def as_tenant(up: Tenants, name: str) -> Any:
    return _Stub(engine_pb2_grpc.EngineServiceStub(up.up.channel), name)


@asynccontextmanager
async def streams(*calls: Any) -> AsyncIterator[None]:
    """Streams that have begun, and are cancelled in the end."""
    try:
        for call in calls:
            assert (await call.read()) is not grpc.aio.EOF
        yield
    finally:
        for call in calls:
            call.cancel()


async def state(call: Any, holds: Any = lambda found: True) -> pb.WatchEngineResponse:
    """The first message that fulfils `holds`; the test's own timeout bounds it."""
    while True:
        message = await call.read()
        assert message is not grpc.aio.EOF
        if holds(message):
            return message


def rows(found: pb.WatchEngineResponse) -> dict[str, tuple[int, int, int]]:
    return {
        "hidden" if each.hidden else each.adapter_id: (each.prefill, each.decode, each.waiting)
        for each in found.adapters
    }


def long(adapter: str = "", **fields: Any) -> Any:
    return streamed(ask(*PROMPT, new=900, adapter=adapter, **fields))


async def test_rows_are_counted_by_adapter_and_stage(tmp_path: Path) -> None:
    async with running(tmp_path, max_running=4, engine_options=SLOW) as up:
        pirate = await up.register("pirate")
        await up.register("brief", 1)
        watch = stub(up).WatchEngine(FAST)
        idle = await state(watch)
        assert rows(idle) == {}
        assert (idle.kv_blocks, idle.kv_blocks_used, idle.max_rows) == (1024, 0, 4)
        assert idle.adapter_bytes_limit == 1 << 20
        mix = [{"adapter_id": "pirate"}, {"adapter_id": "brief", "weight": 0.5}]
        generate = up.generation.GenerateStream
        running_calls = [
            generate(long()),
            generate(long("pirate")),
            generate(long("pirate@1")),
            generate(long(mix=mix)),
        ]
        async with streams(*running_calls):
            waiting = [generate(long("pirate")), generate(long("pirate")), generate(long())]
            wanted = {
                "pirate@1": (0, 2, 2),
                "": (0, 1, 1),
                "pirate@1+brief@1": (0, 1, 0),
            }
            full = await state(watch, lambda found: rows(found) == wanted)
            assert [each.adapter_id for each in full.adapters] == list(wanted), "most rows first"
            assert full.steps > 0
            assert full.generated_tokens > 0
            assert full.prompt_tokens >= 4 * len(PROMPT)
            assert full.resident_adapters == 2
            assert full.adapter_bytes > 0
            assert full.kv_blocks_used > 0
            assert full.time.ToDatetime() > idle.time.ToDatetime()
            for call in waiting:
                call.cancel()
        after = await state(watch, lambda found: not found.adapters)
        assert after.kv_blocks_used == 0
        assert after.kv_blocks_cached > 0
        assert after.steps >= full.steps
        watch.cancel()
        assert pirate.digest


async def test_a_prompt_that_is_computed_in_parts_is_shown_as_such(tmp_path: Path) -> None:
    async with running(
        tmp_path, max_running=2, token_budget=2, engine_options={**SLOW, "max_context": 1024}
    ) as up:
        watch = stub(up).WatchEngine(FAST)
        call = up.generation.Generate(ask(*range(20, 320), new=2))
        await state(watch, lambda found: rows(found) == {"": (1, 0, 0)})
        call.cancel()
        watch.cancel()


async def test_adapters_of_others_are_one_hidden_entry(tmp_path: Path) -> None:
    mine = tenant("c", base=False)
    async with tenants(tmp_path, mine, max_running=8, engine_options=SLOW) as up:
        # The same files under names of both: content must not join what names keep apart.
        await up.a.register("a-one", 0, labels={"team": "a"})
        await up.b.register("b-one", 0, labels={"team": "b"})
        await up.b.register("b-two", 1, labels={"team": "b"})
        calls = [
            up.a.generation.GenerateStream(long("a-one")),
            up.b.generation.GenerateStream(long("b-one")),
            up.b.generation.GenerateStream(long("b-two")),
            up.a.generation.GenerateStream(long()),
        ]
        watches = {name: as_tenant(up, name).WatchEngine(FAST) for name in ("a", "b", "c", "admin")}
        wanted = {
            "a": {"a-one@1": (0, 1, 0), "": (0, 1, 0), "hidden": (0, 2, 0)},
            "b": {"b-one@1": (0, 1, 0), "b-two@1": (0, 1, 0), "": (0, 1, 0), "hidden": (0, 1, 0)},
            "c": {"hidden": (0, 4, 0)},
            "admin": {
                "a-one@1": (0, 1, 0),
                "b-one@1": (0, 1, 0),
                "b-two@1": (0, 1, 0),
                "": (0, 1, 0),
            },
        }
        residents = {"a": 1, "b": 2, "c": 0, "admin": 2}
        async with streams(*calls):
            for name, watch in watches.items():
                found = await state(watch, lambda found: _decoding(found) == 4)
                assert rows(found) == wanted[name], name
                assert found.resident_adapters == residents[name], name
                assert not any(each.adapter_id for each in found.adapters if each.hidden)
                watch.cancel()


def _decoding(found: pb.WatchEngineResponse) -> int:
    return sum(entry.decode for entry in found.adapters)


async def test_a_restart_of_the_engine_does_not_end_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        watch = stub(up).WatchEngine(FAST)
        await up.generation.Generate(ask(*PROMPT, new=4))
        await state(watch, lambda found: found.steps >= 4)
        (pid,) = up.server.engine.pids
        os.kill(pid, signal.SIGKILL)
        away = await state(watch, lambda found: not found.kv_blocks)
        assert (away.steps, away.kv_blocks_used, len(away.adapters)) == (0, 0, 0)
        back = await state(watch, lambda found: found.kv_blocks == 1024)
        assert back.steps == 0, "the counters are those of the new engine"
        answer = await up.generation.Generate(ask(*PROMPT, new=4))
        assert list(answer.token_ids) == expected(list(PROMPT), 4)
        await state(watch, lambda found: found.steps > 0)
        watch.cancel()


async def test_several_engines_are_shown_as_one(tmp_path: Path) -> None:
    async with running(tmp_path, devices="cpu,cpu", max_running=2, engine_options=SLOW) as up:
        watch = stub(up).WatchEngine(FAST)
        assert (await state(watch)).kv_blocks == 2048
        calls = [up.generation.GenerateStream(long()) for _ in range(4)]
        async with streams(*calls):
            found = await state(watch, lambda found: rows(found) == {"": (0, 4, 0)})
            assert found.max_rows == 4
            os.kill(up.server.engine.pids[0], signal.SIGKILL)
            await state(watch, lambda found: found.kv_blocks == 1024)
            await state(watch, lambda found: found.kv_blocks == 2048)
        watch.cancel()


async def test_a_slow_reader_gets_the_newest_state_and_holds_up_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        service = _service(up)
        made = 0
        newest = service._looks.newest

        async def counted() -> Any:
            nonlocal made
            made += 1
            return await newest()

        service._looks.newest = counted
        messages = service.WatchEngine(FAST, None)
        first = await anext(messages)
        await up.generation.Generate(ask(*PROMPT, new=30))
        assert made == 1, "nothing is made for a reader that does not read"
        second = await anext(messages)
        assert second.generated_tokens == first.generated_tokens + 30
        await messages.aclose()


def _service(up: Running) -> Any:
    """A service like the server's own, for calls without a connection."""
    set_caller(EVERYBODY)
    server: Any = up.server
    feed = server._observer.on_table.__self__
    return live.EngineService(server.engine, feed, InFlight(), server._gate)


async def test_without_watchers_the_engine_is_asked_nothing_and_with_many_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, engine_options=SLOW) as up:
        looks = 0
        look = up.server.engine.look

        async def counted() -> Any:
            nonlocal looks
            looks += 1
            return await look()

        monkeypatch.setattr(up.server.engine, "look", counted)
        await up.generation.Generate(ask(*PROMPT, new=10))
        assert looks == 0
        monkeypatch.setattr("loraplex_server.rpc.services.live.batch.FRESH_SECONDS", 60.0)
        watches = [stub(up).WatchEngine(FAST) for _ in range(8)]
        for _ in range(3):
            for watch in watches:
                await state(watch)
        assert looks == 1, "one answer, still fresh, was used for all"
        for watch in watches:
            watch.cancel()


@pytest.mark.parametrize(
    "interval",
    [{"nanos": 99_000_000}, {"seconds": 60, "nanos": 1_000_000}, {"seconds": -1}, {}],
    ids=str,
)
async def test_an_interval_out_of_bounds_is_refused(tmp_path: Path, interval: Any) -> None:
    async with running(tmp_path) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await state(stub(up).WatchEngine(pb.WatchEngineRequest(interval=interval)))
        assert refusal(caught.value).reason == "FIELD_INVALID"


async def test_watches_are_limited_and_end_when_the_server_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_WATCHES", 2)
    async with running(tmp_path) as up:
        first, second = (stub(up).WatchEngine(pb.WatchEngineRequest()) for _ in range(2))
        await state(first)
        await state(second)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await state(stub(up).WatchEngine(pb.WatchEngineRequest()))
        assert refusal(caught.value).reason == "OVERLOADED"
        first.cancel()
        third = None
        while third is None:
            third = stub(up).WatchEngine(pb.WatchEngineRequest())
            try:
                await state(third)
            except grpc.aio.AioRpcError:
                third = None
                await asyncio.sleep(0.01)
        await up.server.drain()
        for watch in (second, third):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await state(watch, lambda found: False)
            assert refusal(caught.value).reason == "DRAINING"


async def test_who_may_not_read_may_not_watch(tmp_path: Path) -> None:
    assert METHOD_ROLES["/loraplex.v1.EngineService/WatchEngine"] == {Role.READ}
    blind = replace(tenant("d"), adapters=None, base=False)
    async with tenants(tmp_path, blind) as up:
        watch = as_tenant(up, "d").WatchEngine(FAST)
        assert (await state(watch)).resident_adapters == 0
        watch.cancel()
