"""Adapters that must not be served are refused by every call that uses them, and by no other."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import generation_pb2
from loraplex_adapters.store import Store
from loraplex_server.registry import census, name_cache
from rpc.harness import Refused, Running, ask, refusal, rest, running, streamed, until


@pytest.fixture(autouse=True)
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes made by another process are seen by the next call."""
    monkeypatch.setattr(name_cache, "FRESH_SECONDS", 0.0)


async def refused(call: Awaitable[Any]) -> Refused:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal(caught.value)


def uses(up: Running, name: str) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call that uses an adapter."""
    one = generation_pb2.AdapterWeight(adapter_id=name, weight=1.0)
    return {
        "generate": lambda: up.generation.Generate(ask(adapter=name)),
        "mix": lambda: up.generation.Generate(ask(mix=[one])),
        "stream": lambda: rest(up.generation.GenerateStream(streamed(ask(adapter=name)))),
        "load": lambda: up.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id=name)),
        "pin": lambda: up.adapters.PinAdapter(pb.PinAdapterRequest(adapter_id=name)),
        "merge": lambda: up.adapters.MergeAdapter(pb.MergeAdapterRequest(adapter_id=name)),
    }


async def served(up: Running, name: str) -> None:
    """Makes the calls that use an adapter; the oracle's adapters cannot be merged."""
    calls = uses(up, name)
    del calls["merge"]
    for call in calls.values():
        await call()


async def manages(up: Running, name: str) -> None:
    """Calls that an operator needs for an adapter that is not served."""
    await up.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id=name))
    await up.adapters.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id=name))
    await up.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest(adapter_id=name))
    await up.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id=name))
    await up.adapters.LabelAdapter(pb.LabelAdapterRequest(adapter_id=name, set={"a": "b"}))
    await up.adapters.SetAlias(pb.SetAliasRequest(alias=f"{name}-alias", adapter_id=name))


@pytest.mark.fault("adapter-kills-engines")
async def test_a_quarantined_adapter_is_refused_until_it_is_released(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        held = await up.register("held", 1, load=True)
        await up.register("sound", 2)
        with Store(tmp_path / "store") as store:
            store.quarantine(held.digest, "it ended the engine 3 times")
        for name, call in uses(up, "held").items():
            seen = await refused(call())
            assert seen.reason == "ADAPTER_QUARANTINED", name
            assert "held@1 is quarantined" in seen.message
            assert "it ended the engine 3 times" in seen.message
        await served(up, "sound")
        await manages(up, "held")
        assert (await refused(uses(up, "held-alias")["generate"]())).reason == "ADAPTER_QUARANTINED"
        for replace in (False, True):  # the same bytes, under another name
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await up.register("again", 1, load=True, replace=replace)
            assert refusal(caught.value).reason == "ADAPTER_QUARANTINED"
        with Store(tmp_path / "store") as store:
            store.release(held.digest)
        await served(up, "held")


OTHER = {"fingerprint": "sha256:" + "b" * 64, "name": "/models/other"}


@pytest.mark.fault("base-changed-under-store")
async def test_adapters_of_another_base_are_refused_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as up:
        await up.register("pirate", 1)
        await up.adapters.SetAlias(pb.SetAliasRequest(alias="prod", adapter_id="pirate"))
        assert up.metric("adapters_unservable", cause="base") == 0
        await served(up, "pirate")
    with caplog.at_level(logging.WARNING):
        async with running(tmp_path, engine_options=OTHER) as up:
            assert up.metric("adapters_unservable", cause="base") == 1
            await up.register("fresh", 2)
            for adapter_id in ("pirate", "pirate@1", "prod"):
                for name, call in uses(up, adapter_id).items():
                    seen = await refused(call())
                    assert seen.reason == "BASE_MODEL_MISMATCH", name
                    assert (
                        "pirate@1 was registered for the base model oracle (oracle)" in seen.message
                    )
                    assert "and this is other (bbbbbbbbbbbb)" in seen.message
            await served(up, "fresh")
            await manages(up, "pirate")
            listed = (await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters
            assert {a.name: a.unservable.reason for a in listed} == {
                "fresh": "",
                "pirate": "BASE_MODEL_MISMATCH",
            }
            assert [(a.base_name, a.base_fingerprint) for a in listed] == [
                ("other", OTHER["fingerprint"]),
                ("oracle", "oracle"),
            ]
    warned = [r.message for r in caplog.records if "were registered for" in r.message]
    assert len(warned) == 1
    assert "1 adapters were registered for oracle (oracle)" in warned[0]
    assert "pirate@1" in warned[0]
    async with running(tmp_path) as up:
        await served(up, "pirate")
        assert (await refused(uses(up, "fresh")["generate"]())).reason == "BASE_MODEL_MISMATCH"


@pytest.mark.fault("base-changed-under-store")
async def test_registering_the_same_bytes_again_is_a_check_against_this_base(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as up:
        before = await up.register("pirate", 1)
        await up.register("twin", 1)
    async with running(tmp_path, engine_options=OTHER) as up:
        again = await up.register("pirate", 1)
        assert (again.digest, again.version) == (before.digest, 1)
        await served(up, "pirate")
        # The content is the same, but nobody has checked this version of it.
        assert (await refused(uses(up, "twin")["generate"]())).reason == "BASE_MODEL_MISMATCH"
    with Store(tmp_path / "store") as store:
        (move,) = store.rebases()
        assert (move.name, move.version, move.digest) == ("pirate", 1, before.digest)
        assert (move.old_fingerprint, move.new_fingerprint) == ("oracle", OTHER["fingerprint"])
        assert (move.old_base, move.new_base) == ("oracle", "other")


@pytest.mark.fault("base-changed-under-store")
async def test_a_version_whose_base_was_never_recorded_is_served_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as up:
        await up.register("pirate", 1)
    with sqlite3.connect(tmp_path / "store" / "index.sqlite3") as index:
        index.execute("UPDATE versions SET base_fingerprint = ''")
    with caplog.at_level(logging.WARNING):
        async with running(tmp_path, engine_options=OTHER) as up:
            await served(up, "pirate")
            assert up.metric("adapters_unservable", cause="base") == 0
    assert any("before bases were recorded" in r.message for r in caplog.records)


@pytest.mark.fault("blob-missing-at-start")
async def test_a_server_starts_without_the_files_of_one_adapter(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        lost = await up.register("lost", 1)
        await up.register("sound", 2)
        await up.adapters.SetAlias(pb.SetAliasRequest(alias="prod", adapter_id="lost"))
    blob = tmp_path / "store" / "blobs" / "sha256" / lost.digest.removeprefix("sha256:")
    shutil.rmtree(blob)
    async with running(tmp_path) as up:
        assert up.metric("adapters_unservable", cause="missing") == 1
        for adapter_id in ("lost", "lost@1", f"lost@{lost.digest}", "prod"):
            seen = await refused(uses(up, adapter_id)["generate"]())
            assert seen.reason == "ADAPTER_CORRUPT", adapter_id
        await served(up, "sound")
        listed = await up.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert [a.name for a in listed.adapters] == ["lost", "sound"]
        watch = up.adapters.WatchAdapters(pb.WatchAdaptersRequest())
        table = (await watch.read()).table
        assert [a.name for a in table.adapters] == ["lost", "sound"]
        watch.cancel()
        await manages(up, "lost")
        again = await up.register("lost", 1)
        assert (again.version, again.digest) == (1, lost.digest)
        await served(up, "lost")
        await served(up, "prod")
        shutil.rmtree(blob)
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="lost"))
        await up.adapters.RestoreAdapter(pb.RestoreAdapterRequest(name="lost"))
        await up.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="lost"))
        with Store(tmp_path / "store") as store:
            assert store.gc(0).versions == ("lost@1",)


@pytest.mark.fault("blob-missing-at-start")
@pytest.mark.parametrize("text", ["{", "[1]", "{}", "null"])
async def test_a_damaged_row_of_one_adapter_stops_no_other(tmp_path: Path, text: str) -> None:
    async with running(tmp_path) as up:
        hurt = await up.register("hurt", 1)
        await up.register("sound", 2)
    with sqlite3.connect(tmp_path / "store" / "index.sqlite3") as index:
        change = "UPDATE blobs SET summary = ? WHERE digest = ?"
        assert index.execute(change, (text, hurt.digest)).rowcount == 1
    async with running(tmp_path) as up:
        await served(up, "sound")
        for name, call in uses(up, "hurt").items():
            assert (await refused(call())).reason == "ADAPTER_CORRUPT", name
        await manages(up, "hurt")
        again = await up.register("hurt", 1)
        assert (again.version, again.rank, again.peft_type) == (1, 2, "LORA")
        await served(up, "hurt")


@pytest.mark.fault("blob-missing-at-start")
async def test_files_that_go_while_the_server_runs_fail_their_adapter_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "CENSUS_SECONDS", 0.02)
    async with running(tmp_path) as up:
        lost = await up.register("lost", 1)
        await up.register("sound", 2)
        await served(up, "lost")
        blobs = tmp_path / "store" / "blobs" / "sha256"
        shutil.rmtree(blobs / lost.digest.removeprefix("sha256:"))
        await served(up, "lost")  # from the device
        await up.adapters.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id="lost"))
        await up.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="lost"))
        for name, call in uses(up, "lost").items():
            assert (await refused(call())).reason == "ADAPTER_CORRUPT", name
        await served(up, "sound")
        await until(lambda: up.metric("adapters_unservable", cause="missing") == 1)
        await up.register("lost", 1)
        await until(lambda: up.metric("adapters_unservable", cause="missing") == 0)
        await served(up, "lost")


@pytest.mark.fault("label-keys-unbounded")
async def test_too_many_label_keys_are_a_bad_request(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        await up.register("a", 1, labels={"team": "ops"})
        keys = [f"k{i}" for i in range(260_000)]
        change = pb.LabelAdapterRequest(adapter_id="a", remove=keys)
        assert (await refused(up.adapters.LabelAdapter(change))).reason == "FIELD_INVALID"
        request = pb.GetAdapterRequest(adapter_id="a")
        assert (await up.adapters.GetAdapter(request)).adapter.labels == {"team": "ops"}
