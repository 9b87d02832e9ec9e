"""The feed's own rules: what counts as which change, and what is survived."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.engine.messages import AdapterStatus
from loraplex_server.registry.catalogue import Catalogue
from loraplex_server.registry.feed import AdapterFeed, Change, Watcher
from loraplex_server.registry.view import View

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def record(name: str, version: int = 1, **changes: object) -> Record:
    fields = {
        "peft_type": "LORA", "rank": 1, "target_modules": (), "size_bytes": 1, "base_model": "",
        "created_at": NOW, "digest": f"sha256:{name}{version}", **changes,
    }  # fmt: skip
    return Record(name=name, version=version, **fields)  # type: ignore[arg-type]


class Shop:
    """A store that a test rewrites, and the feed over it."""

    def __init__(self, **feed: float) -> None:
        self.names: dict[str, Record] = {}
        self.aliases: dict[str, Record] = {}
        self.count = 0
        self.reads = 0
        self.broken = False
        self.feed = AdapterFeed(self.read, self.changes, **feed)  # type: ignore[arg-type]

    async def read(self) -> Catalogue:
        await asyncio.sleep(0)
        self.reads += 1
        if self.broken:
            raise Refusal(Reason.STORE_UNAVAILABLE, "gone")
        return Catalogue(dict(self.names), dict(self.aliases), self.count)

    async def changes(self) -> int:
        await asyncio.sleep(0)
        if self.broken:
            raise Refusal(Reason.STORE_UNAVAILABLE, "gone")
        return self.count

    def put(self, *records: Record) -> None:
        for one in records:
            self.names[one.name] = one
        self.count += 1
        self.feed.changed()


async def changes(watcher: Watcher) -> list[tuple[Change, str]]:
    taken = await asyncio.wait_for(watcher.take(), 10)
    assert taken is not None
    return [(event.change, event.row.digest) for event in taken]


STATES = ["", "host", "loading", "resident", "draining"]


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
async def test_every_move_between_tiers_is_one_change(before: str, after: str) -> None:
    shop = Shop()
    shop.put(record("a"))

    def table(state: str) -> list[AdapterStatus]:
        return [AdapterStatus("sha256:a1", state, 1, 0)] if state else []

    shop.feed.on_table(table(before))
    with shop.feed.watch(View()) as watcher:
        snapshot = await shop.feed.table(watcher)
        assert (snapshot.rows[0].status is None) == (not before)
        shop.feed.on_table(table(after))
        if before == after:
            assert not watcher._events
            return
        wanted = {
            "loading": Change.LOADING,
            "resident": Change.RESIDENT,
            "draining": Change.DRAINING,
            "host": Change.HOST if before in {"", "loading"} else Change.EVICTED,
            "": Change.EVICTED,
        }
        assert await changes(watcher) == [(wanted[after], "sha256:a1")]


async def test_a_name_of_the_same_bytes_is_told_of_too() -> None:
    shop = Shop()
    shop.put(record("a", digest="sha256:x"), record("b", digest="sha256:x"))
    with shop.feed.watch(View()) as watcher:
        await shop.feed.table(watcher)
        shop.feed.on_table([AdapterStatus("sha256:x", "resident", 1, 0, pinned=True)])
        taken = await watcher.take()
        assert taken is not None
        assert [(e.change, e.row.record.name) for e in taken if e.row.record] == [
            (Change.RESIDENT, "a"),
            (Change.RESIDENT, "b"),
            (Change.PINNED, "a"),
            (Change.PINNED, "b"),
        ]


async def test_a_store_that_fails_for_a_while_costs_no_change() -> None:
    shop = Shop(poll_seconds=0.01)
    shop.put(record("a"))
    with shop.feed.watch(View()) as watcher:
        await shop.feed.table(watcher)
        shop.broken = True
        reads = shop.reads
        shop.put(record("a", 2))
        while shop.reads == reads:  # noqa: ASYNC110  (it has failed)
            await asyncio.sleep(0.001)
        shop.broken = False
        assert await changes(watcher) == [(Change.REPLACED, "sha256:a2")]


async def test_a_store_that_fails_at_the_start_is_told_to_the_watcher() -> None:
    shop = Shop()
    shop.broken = True
    with shop.feed.watch(View()) as watcher, pytest.raises(Refusal):
        await shop.feed.table(watcher)
    assert len(shop.feed) == 0


async def test_what_waits_for_a_reader_is_bounded_and_the_others_lose_nothing() -> None:
    shop = Shop(backlog=4)
    shop.put(record("a"))
    with shop.feed.watch(View()) as slow, shop.feed.watch(View()) as quick:
        for watcher in (slow, quick):
            await shop.feed.table(watcher)
        for turn in range(50):
            state = "resident" if turn % 2 else "loading"
            shop.feed.on_table([AdapterStatus("sha256:a1", state, 1, 0)])
            assert len(await changes(quick)) == 1
            assert len(slow._events) <= 4
        assert await slow.take() is None
        await shop.feed.table(slow)
        shop.feed.on_table([])
        assert await changes(slow) == [(Change.EVICTED, "sha256:a1")]


async def test_while_nobody_watches_nobody_reads() -> None:
    shop = Shop(poll_seconds=0.001)
    shop.put(record("a"))
    shop.feed.on_table([AdapterStatus("sha256:a1", "resident", 1, 0)])
    await asyncio.sleep(0.02)
    assert shop.reads == 0


@pytest.mark.fault("hostile-messages")
@pytest.mark.parametrize("ticks", range(5))
async def test_the_feed_ends_with_its_last_watcher_even_as_the_store_changes(ticks: int) -> None:
    shop = Shop()
    before = asyncio.all_tasks()
    with shop.feed.watch(View()):
        for _ in range(3):
            await asyncio.sleep(0)  # the feed waits for a change
        shop.feed.changed()
        for _ in range(ticks):
            await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before
