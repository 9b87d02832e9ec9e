"""While the store's index is away, adapters whose names are known are served, and all else fails
soon and typed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import sqlalchemy as sa
from loraplex.v1 import adapter_pb2 as pb
from loraplex_adapters.store.disk import unavailable
from loraplex_adapters.store.index.database import Database
from rpc.harness import Running, ask, expected, refusal, running, until
from rpc.tenants import tenants

pytestmark = pytest.mark.fault("index-away")

T = TypeVar("T")

PROMPT = [20, 21, 22]


class Index:
    """Stands in front of the database of the index, and can fail or hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        self.answers = threading.Event()
        self.answers.set()
        self.hanging = 0
        for name in ("reading", "writing"):
            self._put_before(monkeypatch, name, getattr(Database, name))

    def _put_before(self, monkeypatch: pytest.MonkeyPatch, name: str, original: Any) -> None:
        @contextmanager
        def transaction(database: Database) -> Iterator[sa.Connection]:
            self.hanging += 1
            assert self.answers.wait(60)
            self.hanging -= 1
            if self.fails:
                raise unavailable("gone")
            with original(database) as connection:
                yield connection

        monkeypatch.setattr(Database, name, transaction)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setattr("loraplex_server.registry.freshness.PATIENCE_SECONDS", 0.2)
    made = Index(monkeypatch)
    yield made
    made.answers.set()


async def soon(call: Awaitable[T]) -> T:
    """A generous bound: calls waited for the index until their deadlines."""
    return await asyncio.wait_for(call, 20)


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await soon(call)
    return refusal(caught.value).reason


async def known_ids_are_served(up: Running, alpha: pb.Adapter) -> None:
    for adapter_id in ("alpha", "alpha@1", f"alpha@{alpha.digest}", "live", f"live@{alpha.digest}"):
        reply = await soon(up.generation.Generate(ask(new=3, adapter=adapter_id)))
        assert list(reply.token_ids) == expected(PROMPT, 3, alpha.digest), adapter_id
        described = await soon(up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=adapter_id)))
        assert described.adapter.digest == alpha.digest
    await soon(up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="alpha")))


async def everything_else_is_refused(up: Running) -> None:
    unknown = [up.generation.Generate(ask(adapter=f"nobody-{i}")) for i in range(10)]
    for call in (
        *unknown,
        up.adapters.ListAdapters(pb.ListAdaptersRequest()),
        up.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name="alpha")),
        up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="alpha")),
        up.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha")),
        up.register("gamma", 3),
    ):
        assert await reason(call) == "STORE_UNAVAILABLE"


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_known_adapters_are_served_and_what_needs_the_index_fails_soon(
    tmp_path: Path, index: Index, how: str
) -> None:
    async with running(tmp_path) as up:
        alpha = await up.register("alpha", load=True)
        await up.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha"))
        await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="live"))
        index.fails = how == "fails"
        if how == "hangs":
            index.answers.clear()
        await known_ids_are_served(up, alpha)
        await everything_else_is_refused(up)
        await known_ids_are_served(up, alpha)
        assert up.metric("index_away_seconds") > 0
        if how == "hangs":
            assert index.hanging <= 3, "calls queue before an index that does not answer"
        index.fails = False
        index.answers.set()
        await until(lambda: up.metric("index_away_seconds") == 0)
        (listed,) = (await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
        assert listed.name == "alpha"
        await up.register("gamma", 3)
        await up.generation.Generate(ask(new=1, adapter="gamma"))


async def test_names_of_the_start_are_known_even_after_somebody_changed_something(
    tmp_path: Path, index: Index
) -> None:
    async with running(tmp_path) as up:
        alpha = await up.register("alpha")
        await up.adapters.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha"))
        await up.register("beta", 1)
    async with running(tmp_path) as up:
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="beta"))
        index.fails = True
        await known_ids_are_served(up, alpha)
        # What this server deleted itself is gone, whatever the index says.
        assert await reason(up.generation.Generate(ask(adapter="beta"))) == "STORE_UNAVAILABLE"
        index.fails = False
        await until(lambda: up.metric("index_away_seconds") == 0)
        assert await reason(up.generation.Generate(ask(adapter="beta"))) == "ADAPTER_NOT_FOUND"


async def test_who_may_use_an_adapter_is_what_this_server_said_last(
    tmp_path: Path, index: Index
) -> None:
    async with tenants(tmp_path) as shop:
        await shop.a.register("a-one")
        await shop.b.register("b-one", 1)
        for who, name in ((shop.a, "a-one"), (shop.b, "b-one")):
            await who.generation.Generate(ask(new=1, adapter=name))
        moved = pb.LabelAdapterRequest(adapter_id="a-one", set={"team": "b"})
        await shop.admin.adapters.LabelAdapter(moved)
        index.fails = True
        await soon(shop.b.generation.Generate(ask(new=1, adapter="b-one")))
        await soon(shop.b.generation.Generate(ask(new=1, adapter="a-one")))
        for name in ("a-one", "b-one", "a-gone"):
            assert (
                await reason(shop.a.generation.Generate(ask(adapter=name))) == "STORE_UNAVAILABLE"
            )
