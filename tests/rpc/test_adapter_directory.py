"""The watched directory: what is taken from it, when, and what is left alone."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loraplex.sources.foreign_ids import name_of
from loraplex.v1 import adapter_pb2 as pb
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.declared.directory import DirectoryWatch
from loraplex_server.runtime.failures import StartFailure
from loraplex_server.series import Series
from prometheus_client import CollectorRegistry
from rpc.harness import Running, running, until, write_adapter

LONG = 3600.0


class Store:
    """Registers and removes as a server does, and remembers it."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.removed: list[str] = []
        self.refusal: Refusal | None = None

    async def ensure(
        self, name: str, source: Any, labels: Mapping[str, str], owner: str
    ) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.refusal
        with source() as folder:
            folder.read_config()
            folder.open_weights(1 << 40).close()
        self.taken.append(name)
        return SimpleNamespace(record=SimpleNamespace(id=f"{name}@1"))

    async def remove(self, name: str, owner: str) -> bool:
        self.removed.append(name)
        return True


@pytest.fixture
def store() -> Store:
    return Store()


async def begun(root: Path, store: Store, seconds: float = LONG, removes: bool = True) -> Any:
    await asyncio.to_thread(root.mkdir, exist_ok=True)
    series = Series(CollectorRegistry())
    return await DirectoryWatch.begin(root, store.ensure, store.remove, series, seconds, removes)


def counts(watch: DirectoryWatch) -> dict[str, float]:
    get = watch.series.registry.get_sample_value
    states = ("registered", "waiting", "refused")
    return {s: get("loraplex_directory_adapters", {"state": s}) or 0 for s in states}


async def test_a_folder_is_taken_once_nothing_has_changed_for_an_interval(
    tmp_path: Path, store: Store
) -> None:
    root = tmp_path / "d"
    watch = await begun(root, store)
    folder = write_adapter(root / "one")
    await watch.look()
    assert store.taken == []
    for _ in range(3):  # a copy in progress
        with (folder / "adapter_model.safetensors").open("ab") as file:
            file.write(b"more")
        await watch.look()
    assert (store.taken, counts(watch)["waiting"]) == ([], 1)
    await watch.look()
    await watch.look()
    assert store.taken == ["one"]
    assert counts(watch) == {"registered": 1, "waiting": 0, "refused": 0}


async def test_what_was_complete_before_the_start_is_there_at_once(
    tmp_path: Path, store: Store
) -> None:
    write_adapter(tmp_path / "d" / "old")
    await begun(tmp_path / "d", store, LONG)
    assert store.taken == []
    await begun(tmp_path / "d", store, 1e-6)
    assert store.taken == ["old"]


async def test_times_that_a_copy_sets_make_no_folder_old(tmp_path: Path, store: Store) -> None:
    folder = write_adapter(tmp_path / "d" / "copied")
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1, 1))
    await begun(tmp_path / "d", store, LONG)
    assert store.taken == []


async def test_a_folder_whose_files_change_is_taken_again(tmp_path: Path, store: Store) -> None:
    root = tmp_path / "d"
    write_adapter(root / "one")
    watch = await begun(root, store, 1e-6)
    write_adapter(root / "new", seed=1)
    shutil.rmtree(root / "one")
    (root / "new").rename(root / "one")
    await watch.look()
    await watch.look()
    assert store.taken == ["one", "one"]
    assert store.removed == []


@pytest.mark.parametrize("removes", [True, False])
async def test_a_folder_that_has_gone_is_removed_only_if_that_is_wanted(
    tmp_path: Path, store: Store, removes: bool
) -> None:
    root = tmp_path / "d"
    write_adapter(root / "one")
    watch = await begun(root, store, 1e-6, removes)
    shutil.rmtree(root / "one")
    await watch.look()
    assert store.removed == []  # it may be in the middle of a replacement
    await watch.look()
    assert store.removed == (["one"] if removes else [])
    assert counts(watch)["registered"] == 0


async def test_a_directory_that_is_away_or_another_removes_nothing(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "d"
    write_adapter(root / "one")
    watch = await begun(root, store, 1e-6)
    root.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await watch.look()
    assert len(caplog.records) == 1
    root.mkdir()
    for _ in range(3):
        await watch.look()
    assert store.removed == []


async def test_a_bad_folder_is_reported_once_and_counted(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "d"
    (root / "empty").mkdir(parents=True)
    write_adapter(root / "half")
    (root / "half" / "adapter_model.safetensors").unlink()
    outside = write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    for name in (".hidden", "lost+found"):
        write_adapter(root / name)
    (root / "file").write_text("x")
    watch = await begun(root, store, 1e-6)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await watch.look()
    assert store.taken == []
    assert counts(watch) == {"registered": 0, "waiting": 0, "refused": 3}
    assert len(caplog.records) == 3
    write_adapter(root / "half")
    for _ in range(2):
        await watch.look()
    assert store.taken == ["half"]
    assert counts(watch)["refused"] == 2


async def test_a_store_that_is_away_is_asked_again(tmp_path: Path, store: Store) -> None:
    write_adapter(tmp_path / "d" / "one")
    store.refusal = Refusal(Reason.STORE_UNAVAILABLE, "away")
    watch = await begun(tmp_path / "d", store, 1e-6)
    assert counts(watch)["refused"] == 1
    store.refusal = None
    await watch.look()
    assert store.taken == ["one"]


async def test_a_directory_that_does_not_exist_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartFailure, match="is not a directory"):
        async with running(tmp_path, adapter_directory=tmp_path / "none"):
            pass


async def versions(up: Running, name: str) -> list[pb.Adapter]:
    reply = await up.adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(name=name))
    return list(reply.adapters)


async def test_a_server_follows_its_directory(tmp_path: Path) -> None:
    root = tmp_path / "d"
    write_adapter(root / "My_Lora.v1")
    settings = {
        "adapter_directory": root,
        "adapter_directory_seconds": 0.05,
        "adapter_directory_removes": True,
    }
    name = name_of("My_Lora.v1")[0]
    async with running(tmp_path, **settings) as up:

        def registered(count: int) -> Any:
            return lambda: up.metric("directory_adapters", state="registered") == count

        await until(registered(1))
        (first,) = await versions(up, name)
        assert first.labels["loraplex.dev/model-id"] == "My_Lora.v1"
        assert first.labels["loraplex.dev/source"] == "directory"
        write_adapter(root / "My_Lora.v1", seed=1)
        while len(await versions(up, name)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await up.register("taken")
        write_adapter(root / "taken", seed=5)
        await until(lambda: up.metric("directory_adapters", state="refused") == 1)
        assert len(await versions(up, "taken")) == 1
        shutil.rmtree(root / "My_Lora.v1")
        await until(registered(0))
        assert [each.name for each in await listed(up)] == ["taken"]
    write_adapter(root / "two")
    async with running(tmp_path, **settings) as up:
        await until(lambda: up.metric("directory_adapters", state="registered") == 1)
        shutil.rmtree(root / "two")
        while "two" in [each.name for each in await listed(up)]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def listed(up: Running) -> list[pb.Adapter]:
    return list((await up.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters)
