"""Several streams as one: their order, and what becomes of them when one fails or all are left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from loraplex_server.rpc.services.completions.interleaving import interleaved


class Streams:
    """Streams of words that note their ends; item 0 of stream i is "i0"."""

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.given = 0

    async def one(
        self, index: int, count: int, turns: int = 1, fails: bool = False
    ) -> AsyncGenerator[str, None]:
        try:
            for i in range(count):
                for _ in range(turns):
                    await asyncio.sleep(0)
                self.given += 1
                yield f"{index}{i}"
            if fails:
                raise ValueError(f"stream {index}")
        finally:
            self.ended.append(index)


async def test_nothing_comes_before_the_first_item_of_the_first() -> None:
    streams = Streams()
    slow = [streams.one(0, 3, turns=50), *(streams.one(i, 3) for i in range(1, 5))]
    items = [item async for item in interleaved(slow)]
    assert items[0] == "00"
    assert sorted(items) == sorted(f"{i}{j}" for i in range(5) for j in range(3))
    for index in range(5):
        assert [item for item in items if item[0] == str(index)] == [
            f"{index}{i}" for i in range(3)
        ]
    assert sorted(streams.ended) == list(range(5))


async def test_one_stream_is_passed_on() -> None:
    streams = Streams()
    assert [item async for item in interleaved([streams.one(7, 2)])] == ["70", "71"]
    assert streams.ended == [7]


@pytest.mark.parametrize("failing", [0, 2])
async def test_a_failure_closes_the_others_even_before_the_first_item(failing: int) -> None:
    streams = Streams()
    parts = [
        streams.one(i, 1 if i == failing else 10_000, turns=1 if i else 20, fails=i == failing)
        for i in range(4)
    ]
    with pytest.raises(ValueError, match=f"stream {failing}"):
        async for _ in interleaved(parts):
            pass
    assert sorted(streams.ended) == list(range(4))


async def test_leaving_closes_all_at_once_and_an_idle_reader_takes_little() -> None:
    streams = Streams()
    async with aclosing(interleaved([streams.one(i, 10_000) for i in range(4)])) as items:
        assert await anext(items) == "00"
        for _ in range(200):
            await asyncio.sleep(0)
        assert streams.given <= 1 + 1 + 4
    assert sorted(streams.ended) == list(range(4))


async def test_a_cancelled_reader_closes_all() -> None:
    streams = Streams()

    async def read() -> None:
        parts = [streams.one(i, 10_000, turns=3) for i in range(3)]
        async with aclosing(interleaved(parts)) as items:
            async for _ in items:
                await asyncio.sleep(0)

    reader = asyncio.create_task(read())
    for _ in range(20):
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert sorted(streams.ended) == list(range(3))
