"""A whole server over engines that hang or are killed: health is true, others are served."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine.test_lost_engine import switched
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import adapter_pb2
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server import app
from loraplex_server.config import Config
from loraplex_server.engine.process.limits import SupervisionLimits
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.exits import ServerExit
from loraplex_server.registry import quarantine
from loraplex_server.registry.feed import AdapterFeed
from loraplex_server.registry.view import View
from loraplex_server.rpc.services import generation
from prometheus_client import exposition
from rpc.harness import Running, ask, config_for, expected, refusal, running, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value).reason


async def sabotage(up: Running, name: str, **options: Any) -> None:
    """Changes how the oracle treats an adapter that is registered."""
    adapter = await up.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter_id=name))
    with Store(up.folder / "store") as store:
        folder = store.path(adapter.adapter.digest)
    (folder / "oracle.json").write_text(json.dumps(options))


async def status(up: Running) -> int:
    health = health_pb2_grpc.HealthStub(up.channel)
    return (await health.Check(health_pb2.HealthCheckRequest())).status


async def is_answered(up: Running, name: str = "", digest: str = "") -> bool:
    reply = await up.generation.Generate(ask(new=5, adapter=name))
    return list(reply.token_ids) == expected([20, 21, 22], 5, digest)


@pytest.mark.fault("engine-hangs")
async def test_a_stopped_engine_is_noticed_and_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, engine_hang_timeout=2) as up:
        good = await up.register("good", load=True)
        assert up.server.engine.pid is not None
        os.kill(up.server.engine.pid, signal.SIGSTOP)
        calls = [asyncio.ensure_future(up.generation.Generate(ask(20 + i))) for i in range(3)]
        for call in calls:
            assert await asyncio.wait_for(reason(call), 30) == "ENGINE_RESTARTED"
        seen = set()
        while not up.server.engine.ready:
            now = await status(up)
            if not up.server.engine.ready:
                seen.add(now)
        assert seen == {NOT_SERVING}
        await until(lambda: up.metric("engine_ready") == 1)
        assert up.metric("engine_deaths_total", cause="silent") == 1
        assert await is_answered(up, "good", good.digest)
        assert await status(up) == SERVING


@pytest.mark.fault("adapter-kills-engines")
@pytest.mark.fault("engine-lost-again")
async def test_an_adapter_that_ends_engines_is_quarantined_until_it_is_released(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        good, bad = await up.register("good", load=True), await up.register("bad", 2)
        await sabotage(up, "bad", kills="publish")
        load = adapter_pb2.LoadAdapterRequest(adapter_id="bad")
        deaths = 0
        for call in (lambda: up.adapters.LoadAdapter(load),
                     lambda: up.generation.Generate(ask(adapter="bad"))):  # fmt: skip
            assert await reason(call()) == "ENGINE_RESTARTED"
            deaths += 1
            await until(lambda: up.server.engine.ready)
            assert await is_answered(up, "good", good.digest)
            assert up.metric("engine_deaths_total", cause="signal") == deaths
        assert await reason(up.generation.Generate(ask(adapter="bad"))) == "ADAPTER_QUARANTINED"
        assert await reason(up.adapters.LoadAdapter(load)) == "ADAPTER_QUARANTINED"
        await until(lambda: up.metric("adapters_unservable", cause="quarantined") == 1)
        with Store(tmp_path / "store") as store:
            assert "2 times" in store.quarantined()[bad.digest].reason
            await asyncio.sleep(0.6)  # what the registry remembers of names is old by then
            assert await reason(up.adapters.LoadAdapter(load)) == "ADAPTER_QUARANTINED"
            assert up.metric("engine_restarts_total") == deaths
            await sabotage(up, "bad")
            store.release(bad.digest)
        await until(lambda: up.metric("adapters_unservable", cause="quarantined") == 0)
        await until(lambda: not up.server.engine.quarantined)
        await asyncio.sleep(0.6)
        assert await is_answered(up, "bad", bad.digest)
        assert await status(up) == SERVING


@pytest.mark.fault("adapter-kills-engines")
async def test_a_quarantine_holds_while_the_store_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as up:
        bad = await up.register("bad")
        await sabotage(up, "bad", kills="read")

        def fail(*_: object) -> None:
            raise Refusal(Reason.STORE_UNAVAILABLE, "the disk is gone")

        monkeypatch.setattr(quarantine, "RELEASE_SECONDS", 0.05)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "quarantine", fail)
            for _ in range(2):
                assert (
                    await reason(up.generation.Generate(ask(adapter="bad"))) == "ENGINE_RESTARTED"
                )
                await until(lambda: up.server.engine.ready)
            for _ in range(3):
                await asyncio.sleep(0.1)
                answer = await reason(up.generation.Generate(ask(adapter="bad")))
                assert answer == "ADAPTER_QUARANTINED"
        await until(lambda: up.metric("adapters_unservable", cause="quarantined") == 1)
        with Store(tmp_path / "store") as store:
            assert store.quarantined().keys() == {bad.digest}


@pytest.mark.fault("deadline-overflows")
async def test_the_longest_deadline_of_grpc_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = 99_999_999  # the most that fit into the header grpc-timeout
    later = time.monotonic() + hours * 3600.0
    monkeypatch.setattr(generation, "admitted_deadline", lambda remaining: later)
    async with running(tmp_path) as up:
        adapter = await up.register("slow")
        await sabotage(up, "slow", seconds=0.3)
        reply = await up.generation.Generate(ask(new=5, adapter="slow"))
        assert list(reply.token_ids) == expected([20, 21, 22], 5, adapter.digest)
        assert up.metric("engine_restarts_total") == 0


# the end of the process


@pytest.fixture(autouse=True)
def _no_timer_ends_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "exit_within", lambda *_: None)


async def exit_code(config: Any, act: Callable[[], object] = lambda: None) -> ServerExit:
    """Runs a server until it ends by itself; `act` is called once it is ready."""
    serving = asyncio.create_task(app.run(config))
    done, _ = await asyncio.wait({serving}, timeout=0.5)
    if not done:
        act()
    return await asyncio.wait_for(serving, 60)


async def failing(*_: object) -> None:
    await asyncio.sleep(0.3)
    raise RuntimeError("a fault of this part")


async def ending(*_: object) -> None:
    await asyncio.sleep(0.3)


@pytest.mark.fault("supervision-ends")
@pytest.mark.parametrize(
    ("owner", "name", "work"),
    [
        ("loraplex_server.engine.process.supervisor.Supervisor", "_supervise", failing),
        ("loraplex_server.engine.process.supervisor.Supervisor", "_supervise", ending),
        ("loraplex_server.registry.quarantine.QuarantineKeeper", "run", failing),
        ("loraplex_server.registry.census.Census", "run", failing),
        ("loraplex_server.rpc.server.RpcServer", "stopped", failing),
        ("loraplex_server.training.queue.JobQueue", "_work", ending),
    ],
)
async def test_the_end_of_a_task_that_should_not_end_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, name: str, work: Any
) -> None:
    monkeypatch.setattr(f"{owner}.{name}", work)
    settings = {"training": True, "training_jobs_dir": tmp_path / "jobs"}
    assert await exit_code(config_for(tmp_path, **settings)) is ServerExit.INTERNAL


@pytest.mark.fault("supervision-ends")
async def test_the_end_of_the_metrics_thread_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = exposition.ThreadingWSGIServer
    monkeypatch.setattr(server, "serve_forever", lambda server, seconds: None)
    monkeypatch.setattr(server, "shutdown", lambda server: None)
    assert await exit_code(config_for(tmp_path)) is ServerExit.INTERNAL


@pytest.mark.fault("supervision-ends")
async def test_the_end_of_the_feed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: ended.append(context["watched_task"]))
    monkeypatch.setattr(AdapterFeed, "_follow", failing)
    feed = AdapterFeed(failing, failing)
    with feed.watch(View()):
        await until(lambda: bool(ended))
    assert ended == ["adapter feed"]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[app.Server]:
    """The servers that have become ready."""
    found: list[app.Server] = []
    start = app.Server.start

    async def started(server: app.Server) -> None:
        await start(server)
        found.append(server)

    monkeypatch.setattr(app.Server, "start", started)
    return found


@pytest.mark.fault("engine-lost-again")
async def test_an_engine_that_cannot_be_kept_running_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list[app.Server]
) -> None:
    limits = SupervisionLimits(first_pause=0.01, longest_pause=0.02, most_ends=2, give_up=0.0)
    monkeypatch.setattr(Config, "supervision_limits", lambda config: limits)
    serving = asyncio.create_task(app.run(config_for(tmp_path)))
    await until(lambda: bool(servers))
    engine = servers[0].engine
    while not serving.done():
        if engine.pid is not None and engine.ready:
            os.kill(engine.pid, signal.SIGKILL)
        await asyncio.sleep(0.01)
    assert serving.result() is ServerExit.ENGINE_LOST


@pytest.mark.fault("restarted-engine-other-base")
async def test_an_engine_that_comes_back_on_another_base_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list[app.Server]
) -> None:
    before = config_for(tmp_path)
    after = config_for(tmp_path, engine_options={"fingerprint": "sha256:other"})
    program, flag = switched(
        tmp_path, before.engine_setup().command(), after.engine_setup().command()
    )
    monkeypatch.setattr(EngineSetup, "command", lambda setup: program)
    serving = asyncio.create_task(app.run(before))
    await until(lambda: bool(servers))
    engine = servers[0].engine
    flag.touch()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.ready)
    while not serving.done():
        assert not engine.ready
        await asyncio.sleep(0.01)
    assert serving.result() is ServerExit.BASE_CHANGED
