"""An address of its own for calls that manage: the same server, and the only place for them."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import adapter_pb2_grpc, generation_pb2_grpc
from loraplex_server import app
from loraplex_server.access.roles import Role
from loraplex_server.exits import ServerExit
from loraplex_server.runtime import parts
from rpc.harness import Running, ask, config_for, expected, refusal, rest, running, until
from security.callers import OPS, Callers, audited, code_of, guarded, key, principal, register

MANAGE = {"manage_host": "127.0.0.1", "manage_port": 0}
DENIED = grpc.StatusCode.PERMISSION_DENIED


def managing(up: Running) -> grpc.aio.Channel:
    address = up.server.manage_address
    assert address is not None
    assert address != up.server.address
    return grpc.aio.insecure_channel(str(address))


async def test_managing_calls_are_served_at_their_address_only(tmp_path: Path) -> None:
    """Also where callers are not authenticated."""
    async with running(tmp_path, **MANAGE) as up, managing(up) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.register("alpha")
        status = refusal(caught.value)
        assert (status.code, status.reason) == (DENIED, "PERMISSION_DENIED")
        for told in (str(up.server.manage_address), "127.0.0.1", "alpha"):
            assert told not in str(caught.value.details())
        call = up.adapters.UploadAdapter(iter([pb.UploadAdapterRequest()]))
        assert await code_of(call) is DENIED
        there = adapter_pb2_grpc.AdapterServiceStub(channel)
        request = pb.RegisterAdapterRequest(name="alpha", path="alpha-0")
        digest = (await there.RegisterAdapter(request)).adapter.digest
        # Calls that change nothing are served at both, by one server.
        for stub in (up.generation, generation_pb2_grpc.GenerationServiceStub(channel)):
            reply = await stub.Generate(ask(adapter="alpha", new=3))
            assert list(reply.token_ids) == expected([20, 21, 22], 3, digest)
        for stub in (up.adapters, there):
            listed = await stub.ListAdapters(pb.ListAdaptersRequest())
            assert [adapter.digest for adapter in listed.adapters] == [digest]


async def test_roles_count_at_both_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(principal(OPS), principal("reader", [Role.READ]))
    async with guarded(tmp_path, monkeypatch, callers, **MANAGE) as up, managing(up) as channel:
        there = adapter_pb2_grpc.AdapterServiceStub(channel)
        request = pb.DeleteAdapterRequest(name="alpha")
        outcomes = [
            await code_of(stub.DeleteAdapter(request, metadata=key(who)))
            for stub in (up.adapters, there)
            for who in (OPS, "reader", "unknown")
        ]
        unknown = grpc.StatusCode.UNAUTHENTICATED
        assert outcomes == [DENIED, DENIED, unknown, grpc.StatusCode.NOT_FOUND, DENIED, unknown]
    here = [(line.get("principal"), line["code"]) for line in audited(tmp_path / "audit.jsonl")]
    assert here[0] == (OPS, "PERMISSION_DENIED")
    assert here[3] == (OPS, "NOT_FOUND")


async def test_without_an_address_of_their_own_they_are_served_at_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path, monkeypatch, Callers(principal(OPS))) as up:
        assert up.server.manage_address is None
        assert (await register(up, OPS, "alpha")).version == 1


async def test_health_and_drain_are_those_of_one_server(tmp_path: Path) -> None:
    slow = {"step_seconds": 0.002, "num_blocks": 1024}
    async with running(tmp_path, **MANAGE, engine_options=slow) as up, managing(up) as channel:
        healths = [health_pb2_grpc.HealthStub(each) for each in (up.channel, channel)]
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for health in healths]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stubs = [generation_pb2_grpc.GenerationServiceStub(each) for each in (up.channel, channel)]
        running_calls = [asyncio.create_task(_whole(stub)) for stub in stubs]
        await until(lambda: up.metric("running_requests") == 2)
        draining = asyncio.create_task(up.server.drain())
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for stub in stubs:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(ask())
            assert refusal(caught.value).reason == "DRAINING"
        for call in running_calls:
            assert await call == expected([20, 21, 22], 100)
        await draining
        for watch in watches:
            assert await code_of(rest(watch)) is grpc.StatusCode.UNAVAILABLE
    for address in (up.server.address, up.server.manage_address):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", address.port)) != 0


async def _whole(stub: generation_pb2_grpc.GenerationServiceStub) -> list[int]:
    return list((await stub.Generate(ask(new=100))).token_ids)


async def test_a_port_that_is_taken_is_said_and_nothing_is_left_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = config_for(tmp_path, manage_host="127.0.0.1", manage_port=port)
        assert await asyncio.wait_for(app.run(config), 60) is ServerExit.PORT_IN_USE
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


async def test_one_port_for_both_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = config_for(tmp_path, port=port, manage_host="127.0.0.1", manage_port=port)
    assert await asyncio.wait_for(app.run(config), 60) is ServerExit.PORT_IN_USE
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


async def test_the_ready_line_names_the_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, **MANAGE) as up:
        parts.announce(up.server.engine, str(up.server), 0.0)
        line = capsys.readouterr().out
        server = up.server
        where = f"grpc {server.address} admin {server.admin_address} manage {server.manage_address}"
        assert line.startswith(f"ready: {where} model ")
