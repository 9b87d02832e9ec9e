"""What does not exist for a caller is answered as what does not exist, in every call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import model_pb2
from loraplex_adapters.store import NOTHING, LabelSelector, Store
from loraplex_server.access.principals import Principal
from loraplex_server.access.roles import ALL_ROLES
from prometheus_client import generate_latest
from rpc.harness import ask, expected, series, streamed
from rpc.tenants import Answer, Tenant, Tenants, answer_of, tenant, tenants

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [20, 21, 22]
CHAT = {"messages": [{"role": "user", "content": "hello"}]}

NOBODY = Principal(name="nobody", roles=ALL_ROLES, adapters=None, base=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tenants]:
    """Tenant a has `a-one` with an alias and `a-held`, which is quarantined; b has `b-own`."""
    folder = tmp_path_factory.mktemp("shop")
    principals = (tenant("c", base=False, imports=None), NOBODY)
    async with tenants(folder, *principals) as made:
        await made.a.register("a-one", 1)
        alias = pb.SetAliasRequest(alias="a-live", adapter_id="a-one")
        await made.a.adapters.SetAlias(alias)
        await made.a.register("a-other", 4)
        held = await made.a.register("a-held", 2)
        await made.b.register("b-own", 3)
        with Store(folder / "store") as store:
            store.quarantine(held.digest, "it ends engines")
        for name in ("a-one", "a-live", "a-one@1"):  # so that the server has them in its cache
            await made.a.generation.Generate(ask(new=1, adapter=name))
        yield made


def by_id(name: str, request: type, **fields: Any) -> Callable[[Tenant, str], Awaitable[Any]]:
    """A call of AdapterService about an adapter id."""
    return lambda who, adapter_id: getattr(who.adapters, name)(
        request(adapter_id=adapter_id, **fields)
    )


async def streaming(who: Tenant, adapter_id: str) -> Any:
    call = who.generation.GenerateStream(streamed(ask(adapter=adapter_id)))
    return [message async for message in call]


def mixing(*ids: str) -> Callable[[Tenant, str], Awaitable[Any]]:
    """A mix, in which "" stands for the adapter that is asked for."""

    def call(who: Tenant, adapter_id: str) -> Any:
        return who.generation.Generate(ask(mix=[{"adapter_id": i or adapter_id} for i in ids]))

    return call


IDS: dict[str, Callable[[Tenant, str], Awaitable[Any]]] = {
    "GetAdapter": by_id("GetAdapter", pb.GetAdapterRequest),
    "LoadAdapter": by_id("LoadAdapter", pb.LoadAdapterRequest),
    "UnloadAdapter": by_id("UnloadAdapter", pb.UnloadAdapterRequest),
    "UnloadAdapter, forced": by_id("UnloadAdapter", pb.UnloadAdapterRequest, force=True),
    "PinAdapter": by_id("PinAdapter", pb.PinAdapterRequest),
    "UnpinAdapter": by_id("UnpinAdapter", pb.UnpinAdapterRequest),
    "MergeAdapter": by_id("MergeAdapter", pb.MergeAdapterRequest),
    "UnmergeAdapter": by_id("UnmergeAdapter", pb.UnmergeAdapterRequest),
    "LabelAdapter": by_id("LabelAdapter", pb.LabelAdapterRequest, set={"stage": "live"}),
    "SetAlias": by_id("SetAlias", pb.SetAliasRequest, alias="b-live"),
    "SetAlias of own": lambda who, given: who.adapters.SetAlias(
        pb.SetAliasRequest(alias="b-live", adapter_id="b-own", expected=given)
    ),
    "Generate": lambda who, given: who.generation.Generate(ask(adapter=given)),
    "GenerateStream": streaming,
    "Generate, first of a mix": mixing("", "b-own"),
    "Generate, last of a mix": mixing("b-own", ""),
    "Generate, a mix of missing ones": mixing("", "b-gone", "a-other"),
    "RenderChat": lambda who, given: who.model.RenderChat(
        model_pb2.RenderChatRequest(adapter_id=given, messages=CHAT)
    ),
}
"""Calls about an adapter id."""

NAMES: dict[str, Callable[[Tenant, str], Awaitable[Any]]] = {
    "ListAdapterVersions": lambda who, name: who.adapters.ListAdapterVersions(
        pb.ListAdapterVersionsRequest(name=name)
    ),
    "DeleteAdapter": lambda who, name: who.adapters.DeleteAdapter(
        pb.DeleteAdapterRequest(name=name)
    ),
    "RestoreAdapter": lambda who, name: who.adapters.RestoreAdapter(
        pb.RestoreAdapterRequest(name=name)
    ),
    "SetAlias": lambda who, name: who.adapters.SetAlias(
        pb.SetAliasRequest(alias=name, adapter_id="b-own")
    ),
    "DeleteAlias": lambda who, name: who.adapters.DeleteAlias(pb.DeleteAliasRequest(alias=name)),
    "RegisterAdapter": lambda who, name: who.adapters.RegisterAdapter(
        pb.RegisterAdapterRequest(name=name, path="b-own-3")
    ),
    "RegisterAdapter, replacing": lambda who, name: who.adapters.RegisterAdapter(
        pb.RegisterAdapterRequest(name=name, path="b-own-3", replace=True, load=True)
    ),
}
"""Calls about a name or an alias."""

TAKING = {"SetAlias of own"}
"""Calls that end with a conflict: the alias does not point there."""


async def answer(call: Awaitable[Any], *names: str) -> Answer:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return answer_of(caught.value, *names)


@pytest.mark.parametrize("name", IDS)
async def test_a_foreign_id_is_answered_as_one_that_never_existed(shop: Tenants, name: str) -> None:
    digest = (await shop.a.get("a-one")).digest
    never = "a-two"
    for foreign, missing in (
        ("a-one", never),
        ("a-live", never),
        ("a-held", never),
        ("a-one@1", f"{never}@1"),
        (f"a-one@{digest}", f"{never}@{digest}"),
        (f"a-live@{digest}", f"{never}@{digest}"),
    ):
        for who in (shop.b, shop.of("nobody")):
            if who.name == "nobody" and name == "SetAlias of own":
                continue
            seen = await answer(IDS[name](who, foreign), foreign)
            wanted = await answer(IDS[name](who, missing), missing)
            assert seen == wanted, foreign
            reason = "ADAPTER_CONFLICT" if name in TAKING else "ADAPTER_NOT_FOUND"
            assert seen.reason == reason


@pytest.mark.parametrize("name", NAMES)
async def test_a_foreign_name_is_answered_as_one_that_never_existed(
    shop: Tenants, name: str
) -> None:
    for foreign in ("a-one", "a-live", "a-held"):
        seen = await answer(NAMES[name](shop.b, foreign), foreign)
        wanted = await answer(NAMES[name](shop.b, "a-two"), "a-two")
        assert seen == wanted
        changes = "ADAPTER_NOT_FOUND" if name == "ListAdapterVersions" else "PERMISSION_DENIED"
        assert seen.reason == changes


async def test_the_owner_is_answered(shop: Tenants) -> None:
    adapter = await shop.a.get("a-live")
    reply = await shop.a.generation.Generate(ask(new=4, adapter="a-one"))
    assert list(reply.token_ids) == expected(PROMPT, 4, adapter.digest)
    assert (await answer(IDS["Generate"](shop.a, "a-held"))).reason == "ADAPTER_QUARANTINED"
    assert await shop.a.names() == ["a-held", "a-one", "a-other"]
    assert await shop.b.names() == ["b-own"]
    assert await shop.admin.names() == ["a-held", "a-one", "a-other", "b-own"]
    assert await shop.of("nobody").names() == []


@contextmanager
def statements(about: str) -> Iterator[list[str]]:
    """The statements that the index is sent meanwhile, as far as they read the table `about`."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if f"FROM {about}" in statement:
            found.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("form", ["{}", "{}@1", "{}@sha256:" + "0" * 64])
async def test_a_foreign_id_costs_the_same_look_ups_as_a_missing_one(
    shop: Tenants, form: str
) -> None:
    sent = []
    for name in ("a-one", "a-live", "a-held", "a-two", "a-three"):
        await shop.a.generation.Generate(ask(new=1, adapter="a-one"))  # it is in the cache
        for _ in range(2):
            with statements("versions") as direct, statements("aliases") as of_aliases:
                await answer(IDS["Generate"](shop.b, form.format(name)))
            sent.append((direct, of_aliases))
    assert len(sent[0][0]) == 1, "every call that is refused looks its id up"
    assert all(each == sent[0] for each in sent)


async def test_what_a_caller_sees_is_looked_up_once(shop: Tenants) -> None:
    await shop.b.generation.Generate(ask(new=1, adapter="b-own"))
    with statements("versions") as sent:
        for _ in range(3):
            await shop.b.generation.Generate(ask(new=1, adapter="b-own"))
    assert sent == []


async def test_refused_names_leave_no_trace_in_the_metrics(shop: Tenants) -> None:
    def about_adapters() -> dict[str, float]:
        text = generate_latest(shop.up.server.metrics.registry).decode()
        return {name: value for name, value in series(text).items() if "'adapter'" in name}

    await shop.b.generation.Generate(ask(new=1, adapter="b-own"))
    before = about_adapters()
    for name in ("a-one", "a-live", "a-two", "a-held"):
        for call in ("Generate", "GenerateStream", "Generate, last of a mix", "LoadAdapter"):
            await answer(IDS[call](shop.b, name))
    assert about_adapters() == before


# the base


async def test_the_base_is_for_those_who_may_use_it(shop: Tenants) -> None:
    closed = shop.of("c")
    for call in (
        closed.generation.Generate(ask(new=1)),
        streaming(closed, ""),
        closed.model.RenderChat(model_pb2.RenderChatRequest(messages=CHAT)),
    ):
        assert (await answer(call)).reason == "PERMISSION_DENIED"
    await shop.b.generation.Generate(ask(new=1))
    await shop.b.model.RenderChat(model_pb2.RenderChatRequest(messages=CHAT))
    described = [
        await who.model.GetModel(model_pb2.GetModelRequest())
        for who in (closed, shop.b, shop.admin)
    ]
    assert described[0] == described[1] == described[2]


# lists


async def test_a_page_token_is_a_name_that_the_caller_saw(shop: Tenants) -> None:
    for seed, name in enumerate(("b-x", "b-y", "b-z")):
        await shop.b.register(name, seed)
    try:
        token, seen = "", []
        while True:
            request = pb.ListAdaptersRequest(page_size=1, page_token=token)
            reply = await shop.b.adapters.ListAdapters(request)
            seen += [adapter.name for adapter in reply.adapters]
            token = reply.next_page_token
            if not token:
                break
            assert token == seen[-1]
        assert seen == ["b-own", "b-x", "b-y", "b-z"]
        # Any name may be given as a token; that it exists for others changes nothing.
        after = [await shop.b.names(page_token=name) for name in ("a-one", "a-two")]
        assert after[0] == after[1] == seen
        assert await shop.b.names(labels={"team": "a"}) == []
    finally:
        for name in ("b-x", "b-y", "b-z"):
            await shop.b.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))


async def test_only_seen_versions_of_a_name_are_listed(shop: Tenants) -> None:
    await shop.b.register("b-many", 1)
    await shop.b.register("b-many", 2, replace=True)
    hide = pb.LabelAdapterRequest(adapter_id="b-many@1", set={"team": "x"})
    await shop.admin.adapters.LabelAdapter(hide)
    reply = await NAMES["ListAdapterVersions"](shop.b, "b-many")
    assert [adapter.version for adapter in reply.adapters] == [2]
    gone = await answer(IDS["GetAdapter"](shop.b, "b-many@1"), "b-many@1")
    never = await answer(IDS["GetAdapter"](shop.b, "b-many@7"), "b-many@7")
    assert gone == never
    both = await NAMES["ListAdapterVersions"](shop.admin, "b-many")
    assert [adapter.version for adapter in both.adapters] == [2, 1]


# selectors


@pytest.mark.parametrize(
    "text",
    ["", "a=b", "a!=b,c", "!a", "a in (x,y)", "a notin (x y,z)", "a in (x y)", "a=", "a in ()"],
)
async def test_a_selector_reads_its_own_text(text: str) -> None:
    selector = LabelSelector.parse(text)
    assert LabelSelector.parse(str(selector)) == selector


async def test_nothing_selects_nothing() -> None:
    assert not NOTHING.matches({})
    assert not NOTHING.matches({"none": ""})
