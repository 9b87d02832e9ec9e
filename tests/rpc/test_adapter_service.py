"""AdapterService over the real store and the real engine."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from loraplex.v1 import adapter_pb2 as pb
from rpc.harness import Running, ask, expected, refusal, running, write_adapter


async def get(up: Running, adapter_id: str) -> pb.Adapter:
    return (await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=adapter_id))).adapter


async def test_an_adapter_is_described_as_its_files_say(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        registered = await up.register("alpha")
        adapter = await get(up, "alpha")
        assert adapter == registered
        assert adapter.name == "alpha"
        assert adapter.version == 1
        assert adapter.digest.startswith("sha256:")
        assert adapter.peft_type == "LORA"
        assert adapter.rank == 2
        assert list(adapter.target_modules) == ["q_proj", "v_proj"]
        assert adapter.size_bytes > 0
        assert adapter.state == pb.ADAPTER_STATE_STORED
        assert adapter.base_model == "oracle"
        assert adapter.create_time.seconds > 0


async def test_registering_the_same_bytes_again_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        write_adapter(tmp_path / "import" / "x")
        request = pb.RegisterAdapterRequest(name="alpha", path="x")
        first = await up.adapters.RegisterAdapter(request)
        again = await up.adapters.RegisterAdapter(request)
        assert (first.created, again.created) == (True, False)
        assert first.adapter == again.adapter


async def test_registering_can_load_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        adapter = await up.register("alpha", load=True)
        assert adapter.state == pb.ADAPTER_STATE_RESIDENT
        assert up.metric("adapters", state="resident") == 1
        assert up.metric("adapter_loads_total", tier="disk", result="ok") == 1
        unload = pb.UnloadAdapterRequest(adapter_id="alpha")
        for _ in range(2):  # idempotent
            reply = await up.adapters.UnloadAdapter(unload)
            assert reply.adapter.state == pb.ADAPTER_STATE_STORED
        assert up.metric("adapters", state="resident") == 0
        load = pb.LoadAdapterRequest(adapter_id=f"alpha@{adapter.digest}")
        for _ in range(2):
            reply = await up.adapters.LoadAdapter(load)
            assert reply.adapter.state == pb.ADAPTER_STATE_RESIDENT


async def test_a_name_does_not_move_to_what_cannot_be_loaded(tmp_path: Path) -> None:
    async with running(tmp_path, engine_options={"adapter_budget_bytes": 4096}) as up:
        for path, rank in (("small", 2), ("large", 15)):
            write_adapter(tmp_path / "import" / path, rank=rank)
        first = pb.RegisterAdapterRequest(name="alpha", path="small", load=True)
        old = (await up.adapters.RegisterAdapter(first)).adapter
        await up.adapters.PinAdapter(pb.PinAdapterRequest(adapter_id="alpha"))
        move = pb.RegisterAdapterRequest(name="alpha", path="large", replace=True, load=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.adapters.RegisterAdapter(move)
        assert refusal(caught.value).reason == "ADAPTER_TOO_LARGE"
        now = await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="alpha"))
        assert (now.adapter.digest, now.adapter.version) == (old.digest, old.version)
        assert now.adapter.state == pb.ADAPTER_STATE_RESIDENT, "a good one made room for it"
        move.load = False
        moved = await up.adapters.RegisterAdapter(move)
        assert moved.created, "nothing but its load was in its way"


async def test_a_name_that_moves_with_a_load_is_resident_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1, load=True)
        moved = await up.register("alpha", 2, replace=True, load=True)
        assert moved.state == pb.ADAPTER_STATE_RESIDENT
        assert up.metric("adapter_loads_total", tier="disk", result="ok") == 2


async def test_listing_pages_through_every_name_once_in_order(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        names = [f"n{i}" for i in range(7)]
        for seed, name in enumerate(reversed(names)):
            await up.register(name, seed)
        seen, token = [], ""
        while True:
            request = pb.ListAdaptersRequest(page_size=3, page_token=token)
            page = await up.adapters.ListAdapters(request)
            assert len(page.adapters) <= 3
            seen += [adapter.name for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert seen == names
        everything = await up.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert len(everything.adapters) == 7
        for wrong in (
            pb.ListAdaptersRequest(page_token="../x"),
            pb.ListAdaptersRequest(page_size=1001),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.adapters.ListAdapters(wrong)
            assert refusal(caught.value).reason == "FIELD_INVALID"


async def test_a_deleted_name_is_gone_and_can_be_taken_again(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="alpha"))
        assert up.metric("adapters", state="registered") == 0
        for call in (
            up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="alpha")),
            up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="alpha")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            seen = refusal(caught.value)
            assert seen.reason == "ADAPTER_NOT_FOUND"
            assert seen.detail(error_details_pb2.ResourceInfo).resource_name == "alpha"
        adapter = await up.register("alpha", 2)
        reply = await up.generation.Generate(ask(new=3, adapter="alpha"))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, adapter.digest)


async def test_nothing_is_registered_from_outside_the_import_root(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        outside = write_adapter(tmp_path / "outside")
        (tmp_path / "import" / "link").symlink_to(outside)
        os.mkfifo(tmp_path / "import" / "fifo")
        for path in (
            "../outside",
            str(outside),
            "link",
            "x/../../outside",
            "fifo",
            "nothing",
            "a\0b",
            ".",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="a", path=path))
            seen = refusal(caught.value)
            assert seen.reason in {"FIELD_INVALID", "ADAPTER_INVALID"}, path
            assert str(tmp_path) not in repr(seen)


async def test_all_that_is_wrong_with_an_adapter_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        write_adapter(tmp_path / "import" / "x", layer_replication=[[0, 1]], arrow_config={"k": 1})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="a", path="x"))
        seen = refusal(caught.value)
        assert seen.reason == "ADAPTER_UNSUPPORTED"
        failed = seen.detail(error_details_pb2.PreconditionFailure).violations
        assert {"layer_replication", "arrow_config"} <= {violation.subject for violation in failed}


async def test_a_damaged_blob_fails_its_own_requests_only(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        bad = await up.register("bad", 1)
        good = await up.register("good", 2)
        (folder,) = [
            path.parent
            for path in (tmp_path / "store").rglob("adapter_config.json")
            if bad.digest.removeprefix("sha256:") in str(path)
        ]
        folder.parent.chmod(0o755)
        folder.rename(tmp_path / "gone")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.generation.Generate(ask(adapter="bad"))
        assert refusal(caught.value).reason == "ADAPTER_CORRUPT"
        reply = await up.generation.Generate(ask(new=3, adapter="good"))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, good.digest)


async def test_what_was_registered_is_there_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        adapter = await up.register("alpha")
    async with running(tmp_path) as up:
        assert up.metric("adapters", state="registered") == 1
        reply = await up.generation.Generate(ask(new=3, adapter="alpha"))
        assert list(reply.token_ids) == expected([20, 21, 22], 3, adapter.digest)
