"""What tenants can tell of each other by the caches: of prompts, and of adapters on the device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.access.principals import EVERYBODY, Principal
from loraplex_server.access.rules import cache_salt
from loraplex_server.engine.messages import files_digest, held_by, holder_of
from rpc.harness import ask, expected, refusal, until
from rpc.tenants import Tenant, Tenants, tenant, tenants
from rpc.test_robustness import at_rest

PROMPT = list(range(20, 40))
SHARED = "shared=yes"


async def cached(who: Tenant, adapter: str = "", salt: str = "", **fields: Any) -> int:
    """How many of the prompt's tokens were found."""
    request = ask(*PROMPT, new=1, adapter=adapter, cache_salt=salt, **fields)
    return (await who.generation.Generate(request)).usage.cached_prompt_tokens


@pytest.mark.parametrize("adapter", ["", "common"])
async def test_a_prompt_of_another_group_is_not_found(tmp_path: Path, adapter: str) -> None:
    group = {"selector": SHARED, "cache_group": "pair"}
    principals = [tenant(name, **group) for name in ("c", "d")]
    async with tenants(tmp_path, tenant("a", SHARED), tenant("b", SHARED), *principals) as shop:
        await shop.admin.register("common", labels={"shared": "yes"})
        assert await cached(shop.a, adapter) == 0
        own = await cached(shop.a, adapter)
        assert own > 0
        assert await cached(shop.b, adapter) == 0
        for salt in ("a", "1:a", "0:", "\0"):  # nor by any salt
            assert await cached(shop.b, adapter, salt) == 0
        assert await cached(shop.b, adapter) == own
        # Two principals of one group share, and a request's salt separates further.
        assert await cached(shop.of("c"), adapter) == 0
        assert await cached(shop.of("d"), adapter) == own
        assert await cached(shop.of("d"), adapter, "mine") == 0


async def test_the_same_bytes_under_two_names_share_no_prompt(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        one, two = await shop.a.register("a-one", 1), await shop.b.register("b-one", 1)
        assert one.digest == two.digest
        assert await cached(shop.a, "a-one") == 0
        assert await cached(shop.a, "a-one") > 0
        assert await cached(shop.b, "b-one") == 0


texts = st.text(max_size=4) | st.sampled_from(["1:a", "1:", "a", "2:1:", ":"])


@given(groups=st.tuples(texts, texts), salts=st.tuples(texts, texts))
def test_no_salt_of_one_group_is_that_of_another(
    groups: tuple[str, str], salts: tuple[str, str]
) -> None:
    principals = [Principal(name="n", cache_group=group) for group in groups]
    made = [cache_salt(p, salt) for p, salt in zip(principals, salts, strict=True)]
    same_group = (groups[0] or "n") == (groups[1] or "n")
    assert (made[0] == made[1]) == (same_group and salts[0] == salts[1])
    assert cache_salt(EVERYBODY, salts[0]) == salts[0]


@given(holder=texts)
def test_a_copys_digest_tells_files_and_holder(holder: str) -> None:
    digest = "sha256:" + "0" * 64
    made = held_by(holder, digest)
    assert (files_digest(made), holder_of(made)) == (digest, holder)


def state(adapter: pb.Adapter) -> str:
    return pb.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_")


async def ordered(who: Tenant, order: str, adapter_id: str) -> pb.Adapter:
    request = getattr(pb, f"{order}AdapterRequest")(adapter_id=adapter_id)
    return (await getattr(who.adapters, f"{order}Adapter")(request)).adapter


async def shared_and_own(shop: Tenants) -> tuple[pb.Adapter, pb.Adapter]:
    """The same bytes as an adapter of a and as one of b; a's is loaded and used."""
    one = await shop.a.register("a-one", 1)
    await shop.b.register("b-one", 1)
    reply = await shop.a.generation.Generate(ask(new=3, adapter="a-one"))
    assert list(reply.token_ids) == expected([20, 21, 22], 3, one.digest)
    await until(lambda: at_rest(shop.up))
    return await shop.a.get("a-one"), await shop.b.get("b-one")


async def test_of_a_shared_copy_its_place_is_shown_and_not_its_use(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        one, two = await shared_and_own(shop)
        for adapter in (one, two):
            assert state(adapter) == "RESIDENT"
            assert not adapter.HasField("last_use_time")
            assert not adapter.HasField("load_duration")
            assert adapter.active_requests == 0
        assert (await shop.admin.get("b-one")).HasField("last_use_time")
        assert len(shop.up.server.engine.adapters) == 1


async def test_a_copy_that_others_use_is_not_changed(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        await shared_and_own(shop)
        for order in ("Unload", "Pin", "Unpin", "Merge", "Unmerge"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ordered(shop.b, order, "b-one")
            assert refusal(caught.value).reason == "PERMISSION_DENIED"
        assert state(await ordered(shop.b, "Load", "b-one")) == "RESIDENT"
        await shop.a.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="a-one"))
        assert state(await ordered(shop.b, "Unload", "b-one")) == "STORED"


async def test_own_copies_are_loaded_used_and_removed_apart(tmp_path: Path) -> None:
    own = [tenant(name, own_copies=True) for name in ("a", "b")]
    async with tenants(tmp_path, *own, engine_options={"merge_budget_bytes": 1 << 20}) as shop:
        one, two = await shared_and_own(shop)
        assert (state(one), state(two)) == ("RESIDENT", "STORED")
        assert one.HasField("last_use_time")
        assert not two.HasField("last_use_time")
        engine = shop.up.server.engine
        assert set(engine.adapters) == {held_by("a", one.digest)}
        loads = shop.up.metric("adapter_loads_total", tier="disk", result="ok")
        reply = await shop.b.generation.Generate(ask(new=3, adapter="b-one"))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, one.digest)
        assert shop.up.metric("adapter_loads_total", tier="disk", result="ok") == loads + 1
        assert set(engine.adapters) == {held_by(name, one.digest) for name in "ab"}
        await ordered(shop.a, "Pin", "a-one")
        assert (await shop.a.get("a-one")).pinned
        assert not (await shop.b.get("b-one")).pinned
        assert state(await ordered(shop.b, "Unload", "b-one")) == "STORED"
        assert state(await shop.a.get("a-one")) == "RESIDENT"
        # A mix uses one copy of each content.
        mix = [{"adapter_id": "a-one", "weight": 0.5}, {"adapter_id": "a-one@1", "weight": 0.5}]
        reply = await shop.a.generation.Generate(ask(new=3, mix=mix))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, one.digest)
        # Those who see all have the shared copy, and can remove every copy.
        assert state(await shop.admin.get("a-one")) == "STORED"
        await ordered(shop.admin, "Load", "a-one")
        assert len(engine.adapters) == 2
        await ordered(shop.admin, "Unload", "a-one")
        await until(lambda: not engine.adapters)


async def test_a_watcher_with_own_copies_is_told_of_these(tmp_path: Path) -> None:
    own = [tenant(name, own_copies=True) for name in ("a", "b")]
    async with tenants(tmp_path, *own) as shop:
        await shop.a.register("a-one", 1)
        await shop.b.register("b-one", 1)
        watch = shop.b.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        while not (await watch.read()).table.complete:
            pass
        await ordered(shop.a, "Load", "a-one")
        await ordered(shop.admin, "Load", "b-one")
        await ordered(shop.b, "Load", "b-one")
        change = (await asyncio.wait_for(watch.read(), 30)).change
        assert change.adapter.name == "b-one"
        assert pb.AdapterChangeType.Name(change.type).endswith("LOADING")
        change = (await asyncio.wait_for(watch.read(), 30)).change
        assert pb.AdapterChangeType.Name(change.type).endswith("RESIDENT")


async def test_own_copies_come_back_after_the_engine_was_lost(tmp_path: Path) -> None:
    async with tenants(tmp_path, tenant("a", own_copies=True)) as shop:
        adapter = await shop.a.register("a-one", 1)
        await ordered(shop.a, "Load", "a-one")
        engine = shop.up.server.engine
        key, restarts = held_by("a", adapter.digest), engine.restarts
        shop_ask = ask(10, new=1)  # the oracle's process ends
        with pytest.raises(Exception, match="restarted"):
            await shop.admin.generation.Generate(shop_ask)
        await until(lambda: engine.restarts > restarts and engine.ready)
        reply = await shop.a.generation.Generate(ask(new=3, adapter="a-one"))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, adapter.digest)
        assert key in engine.adapters
