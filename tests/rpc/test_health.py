"""The health service: its states, and watchers that do not read."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex_server.rpc.server import SERVICES
from rpc.harness import refusal, running, until
from rpc.raw_http2 import DATA, DEFAULT_WINDOW, END_STREAM, frame, raw_connection

WATCH = "/grpc.health.v1.Health/Watch"
Status = health_pb2.HealthCheckResponse


async def test_every_service_has_a_state_and_unknown_ones_have_none(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        stub = health_pb2_grpc.HealthStub(up.channel)
        names = ["", *SERVICES]
        for name in names:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == Status.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await watch.read()).status == Status.SERVICE_UNKNOWN
        watch.cancel()
        listed = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: state.status for name, state in listed.items()} == dict.fromkeys(
            names, Status.SERVING
        )


async def test_watchers_see_each_state_and_end_with_the_server(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        watch = health_pb2_grpc.HealthStub(up.channel).Watch(health_pb2.HealthCheckRequest())
        for serving in (True, False, True):
            up.server._rpc.set_serving(serving)
            expected = Status.SERVING if serving else Status.NOT_SERVING
            assert (await watch.read()).status == expected
        await asyncio.wait_for(up.server.drain(), 20)
        up.server._rpc.set_serving(True)  # an engine that becomes ready now
        assert (await watch.read()).status == Status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert refusal(caught.value).reason == "DRAINING"
        assert len(up.server._rpc._health) == 0


@pytest.mark.fault("health-watch-stalled")
async def test_a_watcher_that_does_not_read_holds_neither_the_state_nor_the_drain(
    tmp_path: Path,
) -> None:
    async with (
        running(tmp_path, drain_timeout=600.0) as up,
        raw_connection(up.server.address, window=0) as hostile,
    ):
        for name in ("", *SERVICES, "nothing"):
            body = health_pb2.HealthCheckRequest(service=name).SerializeToString()
            hostile.call(WATCH, body)
        stub = health_pb2_grpc.HealthStub(up.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        pid = up.server.engine.pid
        assert pid is not None
        up.server._observer.on_restart()
        assert (await asyncio.wait_for(watch.read(), 20)).status == Status.NOT_SERVING
        answer = await asyncio.wait_for(stub.Check(health_pb2.HealthCheckRequest()), 20)
        assert answer.status == Status.NOT_SERVING
        await asyncio.wait_for(up.server.drain(), 20)
        await asyncio.wait_for(up.server.close(), 20)


@pytest.mark.fault("health-watch-stalled")
async def test_watchers_are_bounded_and_stalled_ones_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.services.health.MAX_HEALTH_WATCHERS", 4)
    async with running(tmp_path, write_stall_timeout=1.0) as up, AsyncExitStack() as stack:
        hostile = await stack.enter_async_context(raw_connection(up.server.address, window=0))
        calls = [hostile.call(WATCH, b"") for _ in range(5)]
        await until(lambda: calls[4] in hostile.ended)  # refused, and the others are kept
        assert len(up.server._rpc._health) == 4
        # Nobody else is refused: one who is takes the server for one that does not serve.
        stubs = []
        for _ in range(3):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            channel = grpc.aio.insecure_channel(str(up.server.address), options)
            stubs.append(health_pb2_grpc.HealthStub(await stack.enter_async_context(channel)))
        watches = [s.Watch(health_pb2.HealthCheckRequest()) for s in stubs for _ in range(4)]
        for watch in watches:
            assert (await watch.read()).status == Status.SERVING
        refused = stubs[0].Watch(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert refusal(caught.value).reason == "OVERLOADED"
        assert (await stubs[0].Check(health_pb2.HealthCheckRequest())).status == Status.SERVING
        for watch in watches:
            watch.cancel()
        await until(lambda: len(up.server._rpc._health) == 0)
        assert not up.server._rpc._health._by_peer
        watch = stubs[0].Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        watch.cancel()


async def test_a_check_that_arrives_while_the_drain_begins_is_answered(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as up,
        raw_connection(up.server.address, DEFAULT_WINDOW) as slow,
    ):
        check = slow.call("/grpc.health.v1.Health/Check")
        await until(lambda: len(up.server._path.arrivals) == 1)
        await asyncio.wait_for(up.server.drain(), 20)
        assert len(up.server._path.arrivals) == 1
        slow.send(frame(DATA, END_STREAM, check, bytes(5)))
        await until(lambda: check in slow.ended)
        assert slow.received[check] == 7  # the head of a message, and a status
