"""A whole server with two engines: what clients and operators see of them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server import app
from loraplex_server.config import Config
from loraplex_server.engine.group.group import EngineGroup
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.exits import ServerExit
from prometheus_client import generate_latest
from rpc.harness import (
    CRASH,
    Running,
    ask,
    config_for,
    expected,
    refusal,
    rest,
    running,
    series,
    streamed,
    until,
)

TWO = {"devices": "cpu,cpu"}
SLOW = {"step_seconds": 0.01, "num_blocks": 1024}
PROMPT = [20, 21, 22]
DEVICES = ("cpu:0", "cpu:1")


def group(up: Running) -> EngineGroup:
    assert isinstance(up.server.engine, EngineGroup)
    return up.server.engine


async def get(up: Running, name: str) -> pb.Adapter:
    return (await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=name))).adapter


async def is_serving(up: Running) -> bool:
    health = health_pb2_grpc.HealthStub(up.channel)
    status = (await health.Check(health_pb2.HealthCheckRequest())).status
    return status == health_pb2.HealthCheckResponse.SERVING


def by_device(up: Running, name: str, **labels: str) -> list[float]:
    return [up.metric(name, device=device, **labels) for device in DEVICES]


async def test_both_engines_answer_and_the_orders_of_an_adapter_meet_both(tmp_path: Path) -> None:
    options = {**SLOW, "merges_files": True, "merge_budget_bytes": 1 << 20}
    async with running(tmp_path, **TWO, engine_options=options) as up:
        blocks = 2 * options["num_blocks"]
        assert up.metric("kv_blocks", state="free") == blocks
        assert up.metric("adapter_budget_bytes", tier="device") == 2 << 20
        one, other = await up.register("one"), await up.register("other", 2)
        loaded = await up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="one"))
        assert list(loaded.adapter.devices) == ["cpu:0"]
        digests = {"": "", "one": one.digest, "other": other.digest}

        async def check(names: list[str]) -> None:
            calls = [
                up.generation.Generate(ask(30 + i, new=20, adapter=name))
                for i, name in enumerate(names)
            ]
            replies = [list(reply.token_ids) for reply in await asyncio.gather(*calls)]
            assert replies == [expected([30 + i], 20, digests[n]) for i, n in enumerate(names)]

        mixed = asyncio.create_task(check(["", "one", "other"] * 8))
        await until(lambda: min(by_device(up, "engine_device_requests", state="running")) > 0)
        await mixed
        assert list((await get(up, "one")).devices) == ["cpu:0"]
        await check(["one"] * 20)
        assert set((await get(up, "one")).devices) == set(DEVICES), "a hot adapter spreads"
        assert list((await get(up, "other")).devices) == ["cpu:1"]
        assert by_device(up, "engine_device_adapters") == [1, 2]
        assert up.metric("adapters", state="resident") == 2, "adapters, not their places"
        merge = pb.MergeAdapterRequest(adapter_id="one")
        size = (await get(up, "one")).device_bytes // 2
        assert (await up.adapters.MergeAdapter(merge)).adapter.merged_bytes == 2 * size
        unload = pb.UnloadAdapterRequest(adapter_id="one")
        assert not (await up.adapters.UnloadAdapter(unload)).adapter.devices
        assert by_device(up, "engine_device_adapters") == [0, 1]
        await until(lambda: up.metric("kv_blocks", state="free") == blocks)
        assert by_device(up, "engine_up") == [1, 1]
        assert len(group(up)._routes) == 0


@pytest.mark.fault("engine-lost-again")
async def test_while_an_engine_is_away_the_others_serve_and_health_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = SupervisionLimits(first_pause=0.6, longest_pause=0.6)
    monkeypatch.setattr(Config, "supervision_limits", lambda config: limits)
    async with running(tmp_path, **TWO, engine_options=SLOW) as up:
        engines = group(up)
        adapter = await up.register("one", load=True)
        streams = [
            up.generation.GenerateStream(streamed(ask(30 + i, new=80, adapter=name)))
            for i in range(4)
            for name in ("one", "")
        ]
        for stream in streams:
            await stream.read()
        await until(lambda: all(load.requests for load in engines._routes.loads))
        lost = engines._routes.loads[0].requests
        (pid,) = engines.members[0].client.pids
        os.kill(pid, signal.SIGKILL)
        await until(lambda: by_device(up, "engine_up") == [0, 1])
        assert up.metric("engine_ready") == 1
        assert await is_serving(up)
        for name, digest in (("one", adapter.digest), ("", "")):
            reply = await up.generation.Generate(ask(new=5, adapter=name))
            assert list(reply.token_ids) == expected(PROMPT, 5, digest)
        assert by_device(up, "engine_up") == [0, 1], "nothing has waited for the lost one"
        outcomes = await asyncio.gather(*map(rest, streams), return_exceptions=True)
        failed = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
        assert {refusal(error).reason for error in failed} == {"ENGINE_RESTARTED"}
        assert len(failed) == lost
        assert 0 < lost < len(streams)
        await until(lambda: by_device(up, "engine_up") == [1, 1])
        await until(lambda: by_device(up, "engine_device_adapters") == [1, 1])
        assert by_device(up, "engine_device_restarts_total") == [1, 0]
        assert up.metric("engine_restarts_total") == 1
        assert up.metric("engine_deaths_total", cause="signal") == 1
        for pid in engines.pids:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: up.metric("engine_ready") == 0)
        assert not await is_serving(up)
        await until(lambda: by_device(up, "engine_up") == [1, 1])
        assert await is_serving(up)
        assert up.metric("engine_restarts_total") == 3


async def test_one_engine_shows_the_same_series_as_several(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        assert up.metric("engine_up", device="cpu") == 1
        adapter = await up.register("one", load=True)
        assert not adapter.devices
        with pytest.raises(grpc.aio.AioRpcError):
            await up.generation.Generate(ask(CRASH))
        await until(lambda: up.metric("engine_device_restarts_total", device="cpu") == 1)
        single = engine_series(up)
    async with running(tmp_path, **TWO) as up:
        assert engine_series(up) == single


def engine_series(up: Running) -> set[str]:
    """The names of the series of engines and their devices that there are."""
    names = series(generate_latest(up.server.metrics.registry).decode())
    return {name.partition("[")[0] for name in names if name.startswith("loraplex_engine_")}


async def test_the_front_admits_what_all_engines_can_run(tmp_path: Path) -> None:
    settings = {"max_running": 2, "max_waiting": 1, "engine_options": SLOW}
    async with running(tmp_path, **TWO, **settings) as up:
        calls = [up.generation.GenerateStream(streamed(ask(30 + i, new=60))) for i in range(5)]
        await until(lambda: up.metric("running_requests") == 4)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask())
        assert refusal(caught.value).reason == "OVERLOADED"
        assert by_device(up, "engine_device_requests", state="running") == [2, 2]
        assert len(await asyncio.gather(*map(rest, calls))) == 5


@pytest.mark.fault("restarted-engine-other-base")
async def test_engines_of_different_bases_end_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "exit_within", lambda *_: None)
    options = {"by_device": {"cpu:1": {"fingerprint": "sha256:other"}}}
    assert await app.run(config_for(tmp_path, **TWO, engine_options=options)) is (
        ServerExit.BASE_CHANGED
    )
    assert "cpu:0, now cpu:1" in capsys.readouterr().err
