"""Every way of leaving a running call early reaches the server."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, closing

import pytest
from client.fake_server import WAIT_S, FakeServer
from loraplex import AsyncClient, Cancelled, Client, DeadlineExceeded


@pytest.fixture
def held(server: FakeServer) -> FakeServer:
    """A server that holds every completion after one delta."""
    server.hold_after = 1
    return server


async def reached(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, WAIT_S)


def test_cancel(held: FakeServer, client: Client):
    stream = client.stream("x")
    next(stream)
    stream.cancel()
    assert held.ended.wait(WAIT_S)
    with pytest.raises(Cancelled):
        next(stream)
    with pytest.raises(Cancelled):
        next(stream)


def test_cancel_from_another_thread(held: FakeServer, client: Client):
    stream = client.stream("x")
    next(stream)
    threading.Thread(target=lambda: held.holding.wait(WAIT_S) and stream.cancel()).start()
    with pytest.raises(Cancelled):
        next(stream)


def test_leaving_the_with_block(held: FakeServer, client: Client):
    with client.stream("x") as stream:
        next(stream)
    assert held.ended.wait(WAIT_S)


def test_closing(held: FakeServer, client: Client):
    with closing(client.stream("x")) as stream:
        next(stream)
    assert held.ended.wait(WAIT_S)


def test_breaking_out_of_the_loop(held: FakeServer, client: Client):
    for _ in client.stream("x"):
        break
    assert held.ended.wait(WAIT_S)


def test_closing_the_client(held: FakeServer):
    with Client(held.target) as client:
        stream = client.stream("x")
        next(stream)
    assert held.ended.wait(WAIT_S)
    with pytest.raises(Cancelled):
        next(stream)


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_deadline(held: FakeServer, client: Client, method: str):
    with pytest.raises(DeadlineExceeded):
        list(getattr(client, method)("x", timeout=0.5))
    # A slow machine may spend the half second before the server sees the call.
    if held.calls:
        assert held.ended.wait(WAIT_S)


async def test_async_cancel(held: FakeServer):
    async with AsyncClient(held.target) as client:
        stream = client.stream("x")
        await anext(stream)
        stream.cancel()
        with pytest.raises(Cancelled):
            await anext(stream)
        assert await reached(held.ended)


async def test_async_leaving_the_with_block(held: FakeServer):
    async with AsyncClient(held.target) as client:
        async with client.stream("x") as stream:
            await anext(stream)
        assert await reached(held.ended)


async def test_async_closing(held: FakeServer):
    async with AsyncClient(held.target) as client:
        async with aclosing(client.stream("x")) as stream:
            await anext(stream)
        assert await reached(held.ended)


async def test_async_breaking_out_of_the_loop(held: FakeServer):
    async with AsyncClient(held.target) as client:
        async for _ in client.stream("x"):
            break
            assert await reached(held.ended)


@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_async_cancelling_the_task(held: FakeServer, method: str):
    """It stays asyncio's own CancelledError, so that task groups and timeouts work."""
    async with AsyncClient(held.target) as client:

        async def call() -> None:
            if method == "generate":
                await client.generate("x")
            else:
                await client.stream("x").completion()

        task = asyncio.create_task(call())
        assert await reached(held.holding)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await reached(held.ended)


async def test_async_deadline(held: FakeServer):
    async with AsyncClient(held.target) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("x", timeout=0.5)
        with pytest.raises(DeadlineExceeded):
            await client.stream("x", timeout=0.5).completion()


async def test_async_streams_run_side_by_side(server: FakeServer):
    async with AsyncClient(server.target) as client:
        names = [f"a{i}" for i in range(5)]
        texts = await asyncio.gather(*(client.generate("x", adapter=name) for name in names))
    assert [done.text for done in texts] == [f"{name} says x" for name in names]


def test_an_async_client_may_be_made_before_the_loop(server: FakeServer):
    client = AsyncClient(server.target)

    async def main() -> str:
        async with client:
            return (await client.generate("x")).text

    assert asyncio.run(main()) == "base says x"
