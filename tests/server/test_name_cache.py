"""The cache of names: never wrong about own changes, soon right about others'."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.registry.name_cache import FRESH_SECONDS, NameCache


class World:
    """What ids mean, how often it was asked, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self.counts_read = 0
        self.meaning = {"a": "1", "b": "2", "c": "3"}
        self.asked: list[str] = []
        self.cache: NameCache[str, str] = NameCache(self.changes, size=2, clock=lambda: self.now)

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


class Outage(World):
    """A world whose index can fail, hang or be late."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = NameCache(self.changes, clock=lambda: self.now)
        self.fails = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def _index(self) -> None:
        await self.answers.wait()
        if self.fails:
            raise Refusal(Reason.STORE_UNAVAILABLE, "gone")

    async def changes(self) -> int:
        self.counts_read += 1
        await self._index()
        return self.count

    async def look_up(self, key: str) -> str:
        await self._index()
        if key not in self.meaning:
            raise Refusal(Reason.ADAPTER_NOT_FOUND, "there is no such adapter")
        return await super().look_up(key)

    async def back(self) -> None:
        self.fails = False
        self.answers.set()
        while self.cache.freshness.away:  # noqa: ASYNC110  (it asks by itself)
            await asyncio.sleep(0.005)


async def reason(work: Awaitable[str]) -> Reason:
    with pytest.raises(Refusal) as refused:
        await work
    return refused.value.reason


@pytest.mark.fault("index-away")
async def test_known_ids_are_served_while_the_index_fails_and_others_refused() -> None:
    world = Outage()
    await world.get("a")
    world.fails = True
    world.now += 1
    assert await world.get("a") == "1"
    world.now += 9
    assert world.cache.freshness.away_seconds() == 9
    assert await world.get("a") == "1"
    assert await reason(world.get("b")) is Reason.STORE_UNAVAILABLE
    world.meaning["a"], world.count = "new", 1
    await world.back()
    assert world.cache.freshness.away_seconds() == 0
    assert [await world.get(key) for key in "ab"] == ["new", "2"]
    await world.cache.freshness.close()


@pytest.mark.fault("index-away")
async def test_an_index_that_hangs_is_asked_once_and_holds_up_known_ids_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex_server.registry.freshness.PATIENCE_SECONDS", 0.05)
    world = Outage()
    await world.get("a")
    world.answers.clear()
    world.now += 1
    assert await asyncio.gather(*(world.get("a") for _ in range(20))) == ["1"] * 20
    read = world.counts_read
    for _ in range(20):
        world.now += 1
        done, waiting = await asyncio.wait({asyncio.ensure_future(world.get("a"))}, timeout=20)
        assert [task.result() for task in done] == ["1"]
        assert not waiting
    found = await asyncio.gather(*(reason(world.get(key)) for key in "bcbcbc"))
    assert set(found) == {Reason.STORE_UNAVAILABLE}
    assert world.counts_read == read, "a second reading was begun beside one that hangs"
    assert world.asked == ["a"]
    await world.back()
    assert await world.get("b") == "2"
    await world.cache.freshness.close()


@pytest.mark.fault("index-away")
async def test_while_calls_go_on_none_waits_for_an_index_that_is_late() -> None:
    world = Outage()
    await world.get("a")
    world.now += FRESH_SECONDS * 0.6
    world.answers.clear()
    assert await world.get("a") == "1"  # and begins to read the count
    world.meaning["a"], world.count = "new", 1
    world.answers.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert await world.get("a") == "new"
    assert not world.cache.freshness.away


@pytest.mark.fault("index-away")
async def test_what_has_changed_is_served_as_it_was_only_while_the_index_is_away() -> None:
    world = Outage()
    for key in "abc":
        await world.get(key)
    world.cache.clear()
    world.cache.forget(lambda key, value: key == "b")
    world.fails = True
    assert await world.get("a") == "1"  # its look-up fails
    assert await reason(world.get("b")) is Reason.STORE_UNAVAILABLE  # this process removed it
    await world.back()
    del world.meaning["c"]
    assert await reason(world.get("c")) is Reason.ADAPTER_NOT_FOUND
    world.fails = True
    assert await reason(world.get("c")) is Reason.STORE_UNAVAILABLE  # and is not remembered
    await world.cache.freshness.close()


@pytest.mark.fault("index-away")
async def test_calls_for_one_id_share_a_look_up_which_outlives_its_first_caller() -> None:
    world = Outage()
    await world.get("b")
    world.answers.clear()
    world.cache.clear()
    first, *others = (asyncio.create_task(world.get("a")) for _ in range(10))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    world.answers.set()
    assert await asyncio.gather(*others) == ["1"] * 9
    assert world.asked == ["b", "a"]
