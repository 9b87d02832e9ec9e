"""WatchAdapters: first the table, then each change; slow readers get the table anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex import AdapterEvent, AdapterTable, AsyncClient, Unavailable
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.registry.feed import AdapterFeed
from rpc.harness import Running, ask, refusal, running, slow_channel, until, write_adapter


async def first(watch: Any) -> AdapterTable:
    table = await anext(watch)
    assert isinstance(table, AdapterTable)
    return table


async def events(watch: Any, *kinds: str) -> list[AdapterEvent]:
    """Reads until each of these kinds has come, in this order; what comes between is let pass."""
    found = []
    for kind in kinds:
        while True:
            event = await anext(watch)
            assert isinstance(event, AdapterEvent)
            if event.kind == kind:
                found.append(event)
                break
    return found


async def test_a_watch_begins_with_the_table_and_tells_a_whole_life(tmp_path: Path) -> None:
    options = {"merge_budget_bytes": 100}
    async with (
        running(tmp_path, engine_options=options) as up,
        AsyncClient(str(up.server.address)) as client,
    ):
        old = await up.register("alpha", 1)
        await client.set_alias("live", "alpha")
        async with client.watch_adapters() as watch:
            table = await first(watch)
            assert [adapter.digest for adapter in table.adapters] == [old.digest]
            assert table.aliases == {"live": "alpha@1"}
            await up.register("beta", 2)
            (event,) = await events(watch, "registered")
            assert (event.adapter.name, event.adapter.version) == ("beta", 1)
            await client.load_adapter("beta")
            _, resident = await events(watch, "loading", "resident")
            assert resident.adapter.name == "beta"
            assert resident.adapter.device_bytes > 0
            await client.pin_adapter("beta")
            await client.unpin_adapter("beta")
            await events(watch, "pinned", "unpinned")
            new = await up.register("alpha", 3, replace=True)
            (event,) = await events(watch, "replaced")
            assert event.adapter.digest == new.digest
            await client.set_alias("live", "alpha")
            left, now = await events(watch, "alias_removed", "alias_set")
            assert (left.alias, left.adapter.version) == ("live", 1)
            assert (now.alias, now.adapter.version) == ("live", 2)
            await client.label_adapter("alpha", {"stage": "live"})
            (event,) = await events(watch, "labelled")
            assert event.adapter.labels == {"stage": "live"}
            await client.unload_adapter("beta")
            await events(watch, "evicted")
            await client.delete_adapter("beta")
            (event,) = await events(watch, "deleted")
            assert event.adapter.name == "beta"


async def test_bytes_without_a_name_are_told_of_while_they_are_used(tmp_path: Path) -> None:
    async with running(tmp_path) as up, AsyncClient(str(up.server.address)) as client:
        old = await up.register("alpha", 1, load=True)
        async with client.watch_adapters() as watch:
            await first(watch)
            await up.register("alpha", 2, replace=True)
            await events(watch, "replaced")
            await client.unload_adapter(f"alpha@{old.digest}")
            (event,) = await events(watch, "evicted")
            assert (event.adapter.name, event.adapter.digest) == ("", old.digest)


async def test_what_another_process_does_is_told_too(tmp_path: Path) -> None:
    async with (
        running(tmp_path) as one,
        running(tmp_path) as other,
        AsyncClient(str(other.server.address)) as client,
        client.watch_adapters() as watch,
    ):
        assert (await first(watch)).adapters == ()
        await one.register("alpha", 1)
        (event,) = await events(watch, "registered")
        assert event.adapter.name == "alpha"


async def test_a_slow_reader_is_told_and_gets_the_table_anew(tmp_path: Path) -> None:
    async with running(tmp_path, write_stall_timeout=60.0) as up:
        feed = feed_of(up)
        feed._backlog = 16
        for seed in range(3):
            await up.register(f"n{seed}", seed, labels={f"k{i}": "v" * 200 for i in range(30)})
        async with slow_channel(up) as channel:
            call = channel.unary_stream(
                "/loraplex.v1.AdapterService/WatchAdapters",
                request_serializer=pb.WatchAdaptersRequest.SerializeToString,
                response_deserializer=pb.WatchAdaptersResponse.FromString,
            )(pb.WatchAdaptersRequest())
            await call.read()
            (watcher,) = feed._watchers
            while not watcher._lost:
                for name in ("n0", "n1", "n2"):
                    request = pb.LoadAdapterRequest(adapter_id=name)
                    await up.adapters.LoadAdapter(request)
                    await up.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id=name))
            assert len(watcher._events) <= 16
            kinds = []
            while "resync" not in kinds:
                kinds.append((await call.read()).WhichOneof("event"))
            again = await call.read()
            assert [adapter.name for adapter in again.table.adapters] == ["n0", "n1", "n2"]


async def test_watchers_end_with_the_server_and_do_not_hold_its_drain_up(tmp_path: Path) -> None:
    async with (
        running(tmp_path, drain_timeout=60.0) as up,
        AsyncClient(str(up.server.address)) as client,
        client.watch_adapters() as watch,
    ):
        await first(watch)
        await asyncio.wait_for(up.server.drain(), 20)
        with pytest.raises(Unavailable) as caught:
            await anext(watch)
        assert caught.value.reason == "DRAINING"


async def test_a_cancelled_watch_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path) as up, AsyncClient(str(up.server.address)) as client:
        feed = feed_of(up)
        watches = [client.watch_adapters() for _ in range(3)]
        for watch in watches:
            await first(watch)
        assert len(feed) == 3
        for watch in watches:
            watch.cancel()
            assert [event async for event in watch] == []
        await until(lambda: len(feed) == 0)
        assert feed._catalogue is None
        # Nobody watching costs the requests nothing, and harms nothing.
        await up.register("alpha", 1)
        await up.generation.Generate(ask(new=1, adapter="alpha"))


async def test_too_many_watchers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex_server.rpc.services.watching.MAX_WATCHERS", 0)
    async with running(tmp_path) as up:
        call = up.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert refusal(caught.value).reason == "OVERLOADED"


async def test_a_lost_engine_is_told_as_evictions(tmp_path: Path) -> None:
    write_adapter(tmp_path / "import" / "x")
    async with running(tmp_path) as up, AsyncClient(str(up.server.address)) as client:
        await client.register_adapter("alpha", "x", load=True)
        async with client.watch_adapters() as watch:
            await first(watch)
            with pytest.raises(Unavailable):
                await client.generate(token_ids=[20, 10], timeout=30)  # the oracle's crash token
            await events(watch, "evicted", "loading", "resident")


def feed_of(up: Running) -> AdapterFeed:
    listener = up.server._observer.on_table
    return listener.__self__
