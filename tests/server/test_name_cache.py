"""The cache of names: never wrong about own changes, soon right about others'."""

from __future__ import annotations

import asyncio

import pytest
from loraplex_server.name_cache import FRESH_SECONDS, NameCache


class World:
    """What ids mean, how often it was asked, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self.counts_read = 0
        self.meaning = {"a": "1", "b": "2", "c": "3"}
        self.asked: list[str] = []
        self.cache: NameCache[str] = NameCache(self.changes, size=2, clock=lambda: self.now)

    async def changes(self) -> int:
        self.counts_read += 1
        await asyncio.sleep(0)
        return self.count

    async def look_up(self, key: str) -> str:
        self.asked.append(key)
        found = self.meaning[key]
        await asyncio.sleep(0)
        return found

    async def get(self, key: str) -> str:
        return await self.cache.get(key, lambda: self.look_up(key))


async def test_a_known_id_is_not_looked_up_again() -> None:
    world = World()
    assert [await world.get("a") for _ in range(5)] == ["1"] * 5
    assert world.asked == ["a"]
    assert world.counts_read == 1


async def test_an_own_change_is_seen_at_once() -> None:
    world = World()
    await world.get("a")
    world.meaning["a"] = "new"
    world.cache.clear()
    assert await world.get("a") == "new"


async def test_a_change_elsewhere_is_seen_after_the_next_look_at_the_count() -> None:
    world = World()
    await world.get("a")
    world.meaning["a"], world.count = "new", 1
    assert await world.get("a") == "1"
    world.now += FRESH_SECONDS + 0.01
    assert await world.get("a") == "new"


async def test_many_requests_at_once_read_the_count_once() -> None:
    world = World()
    assert await asyncio.gather(*(world.get("a") for _ in range(50))) == ["1"] * 50
    assert world.counts_read == 1


async def test_what_changed_during_a_look_up_is_not_kept() -> None:
    world = World()
    await world.get("b")
    reading = asyncio.create_task(world.get("a"))
    while world.asked[-1] != "a":  # noqa: ASYNC110  (it has begun to look)
        await asyncio.sleep(0)
    world.meaning["a"] = "new"
    world.cache.clear()
    assert await reading == "1"  # it was asked before the change
    assert await world.get("a") == "new"


async def test_it_is_bounded_and_the_least_used_goes_first() -> None:
    world = World()
    for key in ("a", "b", "a", "c", "a"):
        await world.get(key)
    assert len(world.cache) == 2
    assert world.asked == ["a", "b", "c"]
    await world.get("b")
    assert world.asked[-1] == "b"


async def test_a_failed_look_up_is_not_remembered() -> None:
    world = World()
    with pytest.raises(KeyError):
        await world.get("nobody")
    world.meaning["nobody"] = "somebody"
    assert await world.get("nobody") == "somebody"


async def test_what_is_filled_in_is_not_looked_up_until_something_changes() -> None:
    world = World()
    world.cache.fill({"a": "1", "b": "2", "c": "3"}, count=0)
    assert [await world.get(key) for key in "ab"] == ["1", "2"]
    assert world.asked == []
    assert len(world.cache) == 2, "more than there is room for was kept"
    world.meaning["a"], world.count = "new", 1
    world.now += FRESH_SECONDS + 0.01
    assert await world.get("a") == "new"


async def test_a_change_between_reading_and_filling_in_is_found() -> None:
    world = World()
    world.count, world.meaning["a"] = 1, "new"
    world.cache.fill({"a": "1"}, count=0)
    assert await world.get("a") == "new"
