"""Clients of several servers: they call those that serve, and leave one that is about to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from loraplex import AsyncClient, Client, Unavailable, channel
from rpc.harness import Running, ask, expected, rest, running, streamed, until

SLOW = {"step_seconds": 0.01, "num_blocks": 1024}


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[list[Running]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running(tmp_path / name, engine_options=SLOW))
            for name in ("one", "other")
        ]


def target(servers: list[Running]) -> str:
    return "ipv4:" + ",".join(str(up.server.address) for up in servers)


def answered(up: Running) -> float:
    return up.metric("requests_total", method="Generate", code="OK")


def refused(up: Running) -> float:
    return up.metric("requests_total", method="Generate", code="UNAVAILABLE")


async def generate(client: AsyncClient, times: int = 1) -> None:
    for _ in range(times):
        reply = await client.generate(
            token_ids=[20, 21], max_new_tokens=2, temperature=0.0, ignore_eos=True
        )
        assert list(reply.token_ids) == expected([20, 21], 2)


@pytest.mark.fault("drain-loses-requests")
async def test_calls_leave_a_server_that_stops_serving_and_come_back(two: list[Running]) -> None:
    async with AsyncClient(target(two)) as client:
        while not all(map(answered, two)):  # connections to both take a moment
            await generate(client)
        first, second = two
        first.server._rpc.set_serving(False)
        before = answered(first)
        await generate(client, 3)  # may have been on their way
        settled = answered(first)
        assert settled - before <= 3
        await generate(client, 20)
        assert answered(first) == settled
        first.server._rpc.set_serving(True)
        while answered(first) == settled:
            await generate(client)
        assert not refused(first) + refused(second)


@pytest.mark.fault("drain-loses-requests")
async def test_a_drain_is_noticed_at_once_however_many_calls_there_are(two: list[Running]) -> None:
    first, second = two
    async with AsyncClient(target(two), timeout=60.0) as client:
        while not all(map(answered, two)):
            await generate(client)
        held = first.generation.GenerateStream(streamed(ask(new=150)))
        await held.read()
        done = asyncio.Event()

        async def keep_calling() -> None:
            while not done.is_set():
                await generate(client)

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(keep_calling())
            await asyncio.sleep(0)
            draining = asyncio.create_task(first.server.drain())
            await until(lambda: first.server._gate.draining)
            await rest(held)  # the drain lasts as long as this stream
            await draining
            done.set()
        # Without the health of the servers, half of the calls would have met the draining one.
        assert refused(first) <= 16 * 4
        assert answered(second) > answered(first)


async def test_no_server_that_serves_is_unavailable(two: list[Running]) -> None:
    for up in two:
        up.server._rpc.set_serving(False)
    async with AsyncClient(target(two), timeout=30.0) as client:
        with pytest.raises(Unavailable):
            await generate(client)


@pytest.mark.parametrize(
    ("target", "follows"),
    [
        ("127.0.0.1:50051", False),
        ("localhost:50051", False),
        ("unix:/run/loraplex", False),
        ("[::1]:50051", False),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("ipv6:[::1]:1,[::1]:2", True),
        ("dns:///loraplex:50051", True),
        ("dns:loraplex:50051", True),
    ],
)
def test_only_a_client_of_several_servers_follows_their_health(target: str, follows: bool) -> None:
    config = dict(channel.options(target))["grpc.service_config"]
    assert ("healthCheckConfig" in config) == follows
    assert "retryPolicy" in config
    assert len(dict(channel.options(target))) == len(channel.OPTIONS)


def test_the_blocking_client_balances_too(tmp_path: Path) -> None:
    with Client("ipv4:127.0.0.1:1,127.0.0.1:2", timeout=5.0) as client, pytest.raises(Unavailable):
        client.generate("x")
