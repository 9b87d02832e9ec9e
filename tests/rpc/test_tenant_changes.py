"""What tenants may change: names, labels, aliases, uploads and paths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.uploads import Files
from loraplex.v1 import adapter_pb2 as pb
from loraplex_adapters.store.files.uploads import Uploads
from loraplex_server.rpc.services.uploads import MAX_STREAMS_PER_PEER
from rpc.harness import ask, refusal, write_adapter
from rpc.tenants import Tenant, answer_of, tenant, tenants
from rpc.test_uploads import pieces


async def reason(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value).reason


def labelling(who: Tenant, adapter_id: str, remove: tuple[str, ...] = (), **labels: str) -> Any:
    request = pb.LabelAdapterRequest(adapter_id=adapter_id, set=labels, remove=remove)
    return who.adapters.LabelAdapter(request)


def aliasing(who: Tenant, alias: str, adapter_id: str, **fields: str) -> Any:
    request = pb.SetAliasRequest(alias=alias, adapter_id=adapter_id, **fields)
    return who.adapters.SetAlias(request)


def deleting(who: Tenant, name: str) -> Any:
    return who.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))


def restoring(who: Tenant, name: str) -> Any:
    return who.adapters.RestoreAdapter(pb.RestoreAdapterRequest(name=name))


async def test_a_registered_adapter_has_the_labels_by_which_its_tenant_sees_it(
    tmp_path: Path,
) -> None:
    async with tenants(tmp_path, tenant("c", "team=c,tier in (x,y),!retired")) as shop:
        made = await shop.a.register("a-one", labels={"stage": "test"})
        assert dict(made.labels) == {"team": "a", "stage": "test"}
        assert dict((await shop.a.register("a-one", labels={"team": "a"})).labels)["team"] == "a"
        assert await reason(shop.a.register("a-two", labels={"team": "b"})) == "PERMISSION_DENIED"
        c = shop.of("c")
        assert await reason(c.register("c-one")) == "PERMISSION_DENIED"
        assert await reason(c.register("c-one", labels={"tier": "z"})) == "PERMISSION_DENIED"
        retired = c.register("c-one", labels={"tier": "x", "retired": ""})
        assert await reason(retired) == "PERMISSION_DENIED"
        assert dict((await c.register("c-one", labels={"tier": "x"})).labels) == {
            "team": "c",
            "tier": "x",
        }
        assert await shop.admin.names() == ["a-one", "c-one"]


async def test_who_sees_an_adapter_is_decided_by_those_who_see_all(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        await shop.a.register("a-one")
        assert await reason(labelling(shop.a, "a-one", team="b")) == "PERMISSION_DENIED"
        assert await reason(labelling(shop.a, "a-one", ("team",))) == "PERMISSION_DENIED"
        assert await reason(labelling(shop.a, "a-gone", team="b")) == "PERMISSION_DENIED"
        again = await labelling(shop.a, "a-one", team="a", stage="live")
        assert dict(again.adapter.labels) == {"team": "a", "stage": "live"}
        await shop.a.generation.Generate(ask(new=1, adapter="a-one"))
        await labelling(shop.admin, "a-one", team="b")
        for call in (
            shop.a.get("a-one"),
            shop.a.generation.Generate(ask(adapter="a-one")),
            labelling(shop.a, "a-one", stage="test"),
        ):
            assert await reason(call) == "ADAPTER_NOT_FOUND"
        await shop.b.generation.Generate(ask(new=1, adapter="a-one"))
        # It is not a name of b: b may use it, and not change it.
        for change in (labelling(shop.b, "a-one", stage="x"), deleting(shop.b, "a-one")):
            assert await reason(change) == "PERMISSION_DENIED"


async def test_a_name_in_use_for_others_is_not_taken(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        await shop.admin.register("b-kept", 1, labels={"team": "x"})
        await aliasing(shop.admin, "b-live", "b-kept")
        await shop.b.register("b-own", 2)
        denied = [
            *[shop.b.register(name, 3) for name in ("b-kept", "b-live")],
            *[shop.b.register(name, 3, replace=True) for name in ("b-kept", "b-live")],
            *[aliasing(shop.b, name, "b-own") for name in ("b-kept", "b-live")],
            *[aliasing(shop.b, "b-live", "b-own", expected=e) for e in ("b-kept", "b-own", "")],
            restoring(shop.b, "b-kept"),
        ]
        for call in denied:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            seen = answer_of(caught.value)
            assert seen.reason == "PERMISSION_DENIED"
            assert "sha256" not in str(seen)
            assert "b-kept@" not in str(seen)
        gone = await reason(deleting(shop.b, "b-kept")), await reason(deleting(shop.b, "b-gone"))
        assert gone == ("ADAPTER_NOT_FOUND", "ADAPTER_NOT_FOUND")
        of_alias = pb.DeleteAliasRequest(alias="b-live")
        assert await reason(shop.b.adapters.DeleteAlias(of_alias)) == "ADAPTER_NOT_FOUND"
        assert (await shop.admin.get("b-live")).name == "b-kept"
        assert (await shop.admin.get("b-kept")).version == 1
        await deleting(shop.admin, "b-kept")
        assert await reason(restoring(shop.b, "b-kept")) == "ADAPTER_NOT_FOUND"


async def test_a_tenant_manages_its_own(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        await shop.a.register("a-one", 1)
        await shop.a.register("a-one", 2, replace=True)
        await aliasing(shop.a, "a-live", "a-one@1", expected="")
        await aliasing(shop.a, "a-live", "a-one", expected="a-one@1")
        assert await reason(aliasing(shop.a, "a-live", "a-one", expected="")) == "ADAPTER_CONFLICT"
        assert (await shop.a.get("a-live")).version == 2
        for name in ("Load", "Pin", "Unpin", "Unload"):
            request = getattr(pb, f"{name}AdapterRequest")(adapter_id="a-live")
            await getattr(shop.a.adapters, f"{name}Adapter")(request)
        await deleting(shop.a, "a-one")
        assert await shop.a.names() == []
        assert (await restoring(shop.a, "a-one")).adapter.version == 2
        await shop.a.adapters.DeleteAlias(pb.DeleteAliasRequest(alias="a-live"))
        assert list((await shop.a.get("a-one")).aliases) == []


async def test_a_path_stays_in_the_tenants_part_of_the_import_root(tmp_path: Path) -> None:
    async with tenants(tmp_path, tenant("c", imports=None)) as shop:
        write_adapter(tmp_path / "import" / "a" / "mine", 1)
        write_adapter(tmp_path / "import" / "b" / "theirs", 2)
        (tmp_path / "import" / "a" / "link").symlink_to(tmp_path / "import" / "b" / "theirs")
        linked = tmp_path / "import" / "a" / "files"
        linked.mkdir()
        for file in (tmp_path / "import" / "b" / "theirs").iterdir():
            (linked / file.name).symlink_to(file)
        absolute = str(tmp_path / "import" / "b" / "theirs")
        for path in ("../b/theirs", "b/theirs", "link", "files", absolute, "gone", "..", "."):
            register = pb.RegisterAdapterRequest(name="a-x", path=path)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await shop.a.adapters.RegisterAdapter(register)
            assert refusal(caught.value).reason in {"FIELD_INVALID", "ADAPTER_INVALID"}, path
            assert str(tmp_path) not in str(answer_of(caught.value)).replace(absolute, "")
            validate = pb.ValidateAdapterRequest(path=path)
            if path == "files":  # a directory of the tenant's, whose files are not
                reply = await shop.a.adapters.ValidateAdapter(validate)
                assert reply.findings
                assert not reply.HasField("spec")
                assert str(tmp_path) not in str(reply)
            else:
                assert await reason(shop.a.adapters.ValidateAdapter(validate)) == "FIELD_INVALID"
        register = pb.RegisterAdapterRequest(name="a-x", path="mine")
        await shop.a.adapters.RegisterAdapter(register)
        reply = await shop.a.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="mine"))
        assert not reply.findings
        await shop.admin.adapters.ValidateAdapter(pb.ValidateAdapterRequest(path="b/theirs"))
        c = shop.of("c").adapters
        for call in (
            c.RegisterAdapter(pb.RegisterAdapterRequest(name="c-x", path="mine")),
            c.ValidateAdapter(pb.ValidateAdapterRequest(path="mine")),
        ):
            assert await reason(call) == "PERMISSION_DENIED"


# uploads


async def begin(who: Tenant) -> str:
    return (await who.adapters.StartUpload(pb.StartUploadRequest())).upload_id


async def listed(who: Tenant) -> set[str]:
    reply = await who.adapters.ListUploads(pb.ListUploadsRequest())
    return {upload.upload_id for upload in reply.uploads}


async def one_by_one(
    messages: list[pb.UploadAdapterRequest],
) -> AsyncIterator[pb.UploadAdapterRequest]:
    for message in messages:
        yield message


async def test_an_upload_exists_for_who_began_it(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        files = Files.read(write_adapter(tmp_path / "sent", 1))
        mine, theirs = await begin(shop.a), await begin(shop.b)
        assert await listed(shop.a) == {mine}
        assert await listed(shop.b) == {theirs}
        assert await listed(shop.admin) == {mine, theirs}
        never = "0" * 32
        for upload in (mine, never):
            header = pieces(files, upload, name="b-stolen")
            for call in (
                shop.b.adapters.GetUpload(pb.GetUploadRequest(upload_id=upload)),
                shop.b.adapters.AbortUpload(pb.AbortUploadRequest(upload_id=upload)),
                shop.b.adapters.ValidateAdapter(pb.ValidateAdapterRequest(upload_id=upload)),
                shop.b.adapters.UploadAdapter(one_by_one(header[:1])),
            ):
                assert await reason(call) == "UPLOAD_NOT_FOUND"
        for name, labels in (("b-one", {}), ("a-one", {"team": "b"})):
            header = pieces(files, mine, name=name, labels=labels)[:1]
            refused = await reason(shop.a.adapters.UploadAdapter(one_by_one(header)))
            assert refused == "PERMISSION_DENIED"
        messages = pieces(files, mine, name="a-one", labels={"by": "hand"})
        reply = await shop.a.adapters.UploadAdapter(one_by_one(messages))
        assert dict(reply.adapter.labels) == {"team": "a", "by": "hand"}
        await shop.admin.adapters.AbortUpload(pb.AbortUploadRequest(upload_id=theirs))
        assert await listed(shop.admin) == set()


async def test_one_tenants_uploads_leave_places_to_others(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:  # all from one address
        for _ in range(MAX_STREAMS_PER_PEER):
            await begin(shop.a)
        assert await reason(begin(shop.a)) == "OVERLOADED"
        await begin(shop.b)


def test_an_upload_of_an_older_server_belongs_to_nobody_in_particular(tmp_path: Path) -> None:
    from loraplex_adapters.store import UploadBounds
    from loraplex_model.base.refusal import Refusal

    uploads = Uploads(tmp_path, UploadBounds())
    old = uploads.begin("10.0.0.1")
    assert [upload.id for upload in uploads.all()] == [old]
    assert uploads.all("a") == ()
    with pytest.raises(Refusal):
        uploads.state(old, "a")
    assert uploads.state(old).id == uploads.state(old, "").id == old


# watching


class Watch:
    """What a caller is told."""

    def __init__(self, who: Tenant) -> None:
        self._call = who.adapters.WatchAdapters(pb.WatchAdaptersRequest())

    async def table(self) -> tuple[list[str], dict[str, str]]:
        """The names and the aliases at the beginning."""
        names, aliases = [], {}
        while True:
            table = (await self._call.read()).table
            names += [adapter.name for adapter in table.adapters]
            aliases.update({a.alias: f"{a.name}@{a.version}" for a in table.aliases})
            if table.complete:
                return names, aliases

    async def next(self) -> tuple[str, str, str]:
        """The next change: its kind, its adapter's id, its alias."""
        change = (await asyncio.wait_for(self._call.read(), 30)).change
        kind = pb.AdapterChangeType.Name(change.type).removeprefix("ADAPTER_CHANGE_TYPE_")
        adapter = change.adapter
        return kind, f"{adapter.name}@{adapter.version}", change.alias


async def test_a_watcher_is_told_of_what_it_sees_and_of_nothing_else(tmp_path: Path) -> None:
    async with tenants(tmp_path) as shop:
        await shop.a.register("a-one", 1)
        await aliasing(shop.a, "a-live", "a-one")
        await shop.b.register("b-one", 1)  # the same bytes
        a, b = Watch(shop.a), Watch(shop.b)
        assert await a.table() == (["a-one"], {"a-live": "a-one@1"})
        assert await b.table() == (["b-one"], {})
        await shop.a.register("a-two", 2)
        assert await a.next() == ("REGISTERED", "a-two@1", "")
        await labelling(shop.a, "a-two", stage="live")
        assert await a.next() == ("LABELLED", "a-two@1", "")
        await labelling(shop.admin, "a-one", team="b")  # with its alias
        assert await a.next() == ("DELETED", "a-one@1", "")
        assert await a.next() == ("ALIAS_REMOVED", "a-one@1", "a-live")
        assert await b.next() == ("REGISTERED", "a-one@1", "")
        assert await b.next() == ("ALIAS_SET", "a-one@1", "a-live")
        await labelling(shop.admin, "a-one", team="a")
        assert await b.next() == ("DELETED", "a-one@1", "")
        assert await b.next() == ("ALIAS_REMOVED", "a-one@1", "a-live")
        assert await a.next() == ("REGISTERED", "a-one@1", "")
        assert await a.next() == ("ALIAS_SET", "a-one@1", "a-live")
        load = pb.LoadAdapterRequest(adapter_id="a-two")
        await shop.a.adapters.LoadAdapter(load)
        assert await a.next() == ("LOADING", "a-two@1", "")
        assert await a.next() == ("RESIDENT", "a-two@1", "")
        await shop.a.register("a-two", 3, replace=True)
        assert await a.next() == ("REPLACED", "a-two@2", "")
        # The old content has no name any more, so nobody but those who see all is told of it.
        unload = pb.UnloadAdapterRequest(adapter_id="a-two@1")
        await shop.admin.adapters.UnloadAdapter(unload)
        await deleting(shop.a, "a-two")
        assert await a.next() == ("DELETED", "a-two@2", "")
        await shop.b.register("b-two", 4)
        assert await b.next() == ("REGISTERED", "b-two@1", "")
