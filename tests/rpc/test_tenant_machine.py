"""Whatever tenants do, each is answered as if only its own adapters existed.

A model has every version with its labels. What it says that a caller sees must be exactly what the
server answers. A refusal of a name that exists for others must be, word for word, that of a name
that never existed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import ask, expected, write_adapter
from rpc.tenants import ADMIN, Tenant, Tenants, answer_of, tenant, tenants

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEAMS = ("a", "b", "c")
CALLERS = (*TEAMS, ADMIN)
OWNER = "owner"
"""Stands for the team whose prefix a name has."""

NAMES = [f"{team}-{n}" for team in TEAMS for n in ("one", "two")]
ALIASES = [f"{team}-live" for team in TEAMS]
SEEDS = range(3)
NEVER = "{}-never"
PROMPT = [20, 21, 22]


@dataclass(frozen=True)
class Register:
    who: str
    name: str
    seed: int


@dataclass(frozen=True)
class Relabel:
    """The administrator moves the current version of a name to another team."""

    name: str
    team: str


@dataclass(frozen=True)
class SetAlias:
    who: str
    alias: str
    target: str


@dataclass(frozen=True)
class Delete:
    who: str
    name: str


@dataclass(frozen=True)
class Generate:
    who: str
    ids: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Look:
    """Get, all versions, the list and a fresh watch of one caller."""

    who: str
    id: tuple[str, str]


callers, names, called = (st.sampled_from(each) for each in (CALLERS, NAMES, [*NAMES, *ALIASES]))
changers = st.sampled_from([OWNER, OWNER, OWNER, ADMIN, "a"])
ids = st.tuples(called, st.sampled_from(["", "", "first", "last"]))
"""A name or an alias, and whether its first or last version is pinned."""

operations = st.lists(
    st.one_of(
        st.builds(Register, changers, names, st.sampled_from(SEEDS)),
        st.builds(Register, changers, names, st.sampled_from(SEEDS)),
        st.builds(Relabel, names, st.sampled_from(TEAMS)),
        st.builds(SetAlias, changers, st.sampled_from(ALIASES), names),
        st.builds(Delete, changers, names),
        st.builds(Generate, callers, st.lists(ids, min_size=1, max_size=2).map(tuple)),
        st.builds(Look, callers, ids),
        st.builds(Look, callers, ids),
    ),
    min_size=8,
    max_size=30,
)


@dataclass
class Version:
    """A version of a name: its content, and the team that sees it."""

    name: str
    number: int
    digest: str
    team: str
    is_deleted: bool = False

    def is_seen_by(self, who: str) -> bool:
        return who in (ADMIN, self.team)


@dataclass
class Model:
    """All versions that are not deleted, by name, and what aliases point to, even if deleted."""

    versions: dict[str, list[Version]] = field(default_factory=dict)
    aliases: dict[str, Version] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    """The last number of each name as far as it is known; it is never used again."""

    def written(self, name: str, pin: str) -> str:
        """An id as a caller writes it."""
        numbers = [version.number for version in self.versions.get(name, [])] or [1]
        return name if not pin else f"{name}@{numbers[0 if pin == 'first' else -1]}"

    def seen(self, who: str, adapter_id: str) -> Version | None:
        """What an id means to a caller."""
        name, _, pin = adapter_id.partition("@")
        found = self.versions.get(name, [])
        if pin:
            meant = next((v for v in found if v.number == int(pin)), None)
        else:
            meant = found[-1] if found else self.aliases.get(name)
        if meant is None or meant.is_deleted or not meant.is_seen_by(who):
            return None
        return meant

    def is_hidden(self, who: str, name: str) -> bool:
        """Whether a name is in use, but not for the caller."""
        used = self.versions[name][-1] if name in self.versions else self.aliases.get(name)
        return used is not None and not used.is_seen_by(who)

    def listed(self, who: str) -> list[str]:
        return [name for name in sorted(self.versions) if self.seen(who, name)]

    def pointing(self, who: str) -> dict[str, str]:
        seen = {alias: v for alias, v in self.aliases.items() if v.is_seen_by(who)}
        return {alias: f"{v.name}@{v.number}" for alias, v in seen.items() if not v.is_deleted}


@dataclass
class Story:
    """One example on the server that all examples share."""

    shop: Tenants
    model: Model = field(default_factory=Model)

    def client(self, who: str) -> Tenant:
        return self.shop.of(who)

    async def refused(self, call: Any, *given: str) -> str:
        """The reason of a refusal, which names nothing that the caller did not name."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        answer = answer_of(caught.value, *given)
        for told in (*NAMES, *ALIASES, "sha256"):
            assert told not in str(answer), answer
        return answer.reason

    async def same_as_never(self, call: Any, given: str, who: str) -> None:
        """A call about a foreign id is answered as one about an id that never existed."""
        if self.model.seen(ADMIN, given):  # so that the server has it in its cache
            await self.client(ADMIN).get(given)
        name, at, pin = given.partition("@")
        never = NEVER.format(name[0]) + at + pin
        with pytest.raises(grpc.aio.AioRpcError) as foreign:
            await call(given)
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await call(never)
        assert answer_of(foreign.value, given) == answer_of(missing.value, never), who
        assert answer_of(foreign.value, given).reason == "ADAPTER_NOT_FOUND"

    async def do(self, operation: object) -> None:
        def caller(who: str, name: str) -> str:
            return name[0] if who == OWNER else who

        match operation:
            case Register(who, name, seed):
                await self.register(caller(who, name), name, seed)
            case Relabel(name, team):
                await self.relabel(name, team)
            case SetAlias(who, alias, target):
                await self.set_alias(caller(who, alias), alias, target)
            case Delete(who, name):
                await self.delete(caller(who, name), name)
            case Generate(who, ids):
                await self.generate(who, tuple(self.model.written(*each) for each in ids))
            case Look(who, id):
                await self.look(who, self.model.written(*id))

    def may_change(self, who: str, name: str) -> bool:
        return who == ADMIN or name.startswith(f"{who}-")

    async def register(self, who: str, name: str, seed: int) -> None:
        labels = {"team": name[0]} if who == ADMIN else {}
        request = pb.RegisterAdapterRequest(
            name=name, path=f"seed-{seed}", replace=True, labels=labels
        )
        call = self.client(who).adapters.RegisterAdapter(request)
        if not self.may_change(who, name) or self.model.is_hidden(who, name):
            assert await self.refused(call, name, f"'{who}-'") == "PERMISSION_DENIED"
            return
        adapter = (await call).adapter
        found = self.model.versions.setdefault(name, [])
        if found and found[-1].digest == adapter.digest:
            assert adapter.version == found[-1].number
            found[-1].team = labels.get("team", who)
            return
        assert adapter.version == self.model.last.get(name, adapter.version - 1) + 1
        self.model.last[name] = adapter.version
        found.append(Version(name, adapter.version, adapter.digest, labels.get("team", who)))

    async def relabel(self, name: str, team: str) -> None:
        request = pb.LabelAdapterRequest(adapter_id=name, set={"team": team})
        for other in TEAMS:  # whoever sees it or not, a tenant may not
            if other != team:
                call = self.client(other).adapters.LabelAdapter(request)
                assert await self.refused(call, name) == "PERMISSION_DENIED"
        if found := self.model.versions.get(name):
            await self.client(ADMIN).adapters.LabelAdapter(request)
            found[-1].team = team

    async def set_alias(self, who: str, alias: str, target: str) -> None:
        def call(adapter_id: str) -> Any:
            request = pb.SetAliasRequest(alias=alias, adapter_id=adapter_id)
            return self.client(who).adapters.SetAlias(request)

        meant = self.model.seen(who, target)
        if not self.may_change(who, alias):
            assert await self.refused(call(target), f"'{who}-'") == "PERMISSION_DENIED"
        elif meant is None:
            await self.same_as_never(call, target, who)
        elif self.model.is_hidden(who, alias):
            assert await self.refused(call(target), alias) == "PERMISSION_DENIED"
        else:
            await call(target)
            self.model.aliases[alias] = meant

    async def delete(self, who: str, name: str) -> None:
        call = self.client(who).adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))
        if not self.may_change(who, name):
            assert await self.refused(call, f"'{who}-'") == "PERMISSION_DENIED"
        elif name not in self.model.listed(who):
            assert await self.refused(call, name) == "ADAPTER_NOT_FOUND"
        else:
            await call
            for version in self.model.versions.pop(name):
                version.is_deleted = True

    async def generate(self, who: str, ids: tuple[str, ...]) -> None:
        def call(*ids: str) -> Any:
            request = ask(*PROMPT, new=3, mix=[{"adapter_id": each} for each in ids])
            return self.client(who).generation.Generate(request)

        meant = [self.model.seen(who, each) for each in ids]
        first = next((i for i, each in enumerate(meant) if each is None), None)
        if first is not None:
            own = [each for each in ids if self.model.seen(who, each) and each != ids[first]]
            assert await self.refused(call(*ids), *ids) == "ADAPTER_NOT_FOUND"
            await self.same_as_never(lambda given: call(*own, given), ids[first], who)
            return
        reply = await call(*ids)
        mix = [(version.digest, 1.0) for version in meant if version]
        assert list(reply.token_ids) == expected(PROMPT, 3, mix=mix)

    async def look(self, who: str, adapter_id: str) -> None:
        client, model = self.client(who), self.model

        def get(adapter_id: str) -> Any:
            return client.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=adapter_id))

        meant = model.seen(who, adapter_id)
        if meant is None:
            await self.same_as_never(get, adapter_id, who)
        else:
            found = (await get(adapter_id)).adapter
            pointing = model.pointing(who)
            assert (found.name, found.version) == (meant.name, meant.number)
            assert found.digest == meant.digest
            assert set(found.aliases) == {a for a, to in pointing.items() if to == self.id(meant)}
        name = adapter_id.partition("@")[0]

        def versions(name: str) -> Any:
            request = pb.ListAdapterVersionsRequest(name=name)
            return client.adapters.ListAdapterVersions(request)

        seen = [v.number for v in model.versions.get(name, []) if v.is_seen_by(who)]
        if seen:
            reply = await versions(name)
            assert [adapter.version for adapter in reply.adapters] == seen[::-1]
        else:
            await self.same_as_never(versions, name, who)
        assert await client.names() == model.listed(who)
        assert await self.watched(client) == (model.listed(who), model.pointing(who))

    @staticmethod
    def id(version: Version) -> str:
        return f"{version.name}@{version.number}"

    @staticmethod
    async def watched(client: Tenant) -> tuple[list[str], dict[str, str]]:
        """The table with which a watch begins."""
        call = client.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        found: list[str] = []
        while True:
            table = (await call.read()).table
            found += [adapter.name for adapter in table.adapters]
            if table.complete:
                call.cancel()
                return found, {a.alias: f"{a.name}@{a.version}" for a in table.aliases}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    principals = [tenant(team) for team in TEAMS]
    async with tenants(folder, *principals) as made:
        for seed in SEEDS:
            for part in ("", *TEAMS):
                write_adapter(folder / "import" / part / f"seed-{seed}", seed)
        yield made


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=operations)
async def test_each_tenant_is_answered_as_if_only_its_own_existed(
    shop: Tenants, program: list[object]
) -> None:
    for name in await shop.admin.names():  # what the example before left
        await shop.admin.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))
    for alias in ALIASES:
        with suppress(grpc.aio.AioRpcError):
            await shop.admin.adapters.DeleteAlias(pb.DeleteAliasRequest(alias=alias))
    story = Story(shop)
    begin: list[object] = [Register(OWNER, f"{team}-one", 0) for team in TEAMS]  # the same bytes
    begin += [SetAlias(OWNER, f"{team}-live", f"{team}-one") for team in TEAMS]
    for operation in [*begin, *program]:
        await story.do(operation)
