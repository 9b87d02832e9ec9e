"""Labels of a watched directory: the operator's for all, and of a folder only where allowed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.declared.labels import LABELS_FILE
from rpc.harness import until, write_adapter
from rpc.tenants import Tenants, tenants

SOURCE = {"loraplex.dev/source": "directory"}


def watching(root: Path, **more: Any) -> dict[str, Any]:
    root.mkdir(exist_ok=True)
    return {"adapter_directory": root, "adapter_directory_seconds": 0.05, **more}


async def states(shop: Tenants, **counts: int) -> None:
    """Waits until so many folders are in these states."""
    for state, count in counts.items():
        await until(lambda: shop.up.metric("directory_adapters", state=state) == count)  # noqa: B023


async def labels(shop: Tenants, name: str) -> dict[str, str]:
    return dict((await shop.admin.get(name)).labels)


async def become(shop: Tenants, name: str, wanted: dict[str, str]) -> None:
    """Waits until an adapter has these labels."""
    while await labels(shop, name) != wanted:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)


async def test_the_operators_labels_decide_who_sees_a_directory(tmp_path: Path) -> None:
    root = tmp_path / "d"
    write_adapter(root / "one")
    async with tenants(tmp_path, **watching(root)) as shop:
        await states(shop, registered=1)
        assert await labels(shop, "one") == SOURCE
        assert await shop.a.names() == []
    given = {"team": "a", "env": "test"}
    async with tenants(tmp_path, **watching(root, adapter_directory_labels=given)) as shop:
        await states(shop, registered=1)
        await become(shop, "one", {**given, **SOURCE})  # of the version that was there
        write_adapter(root / "Second One", 1)
        await states(shop, registered=2)
        (second,) = {*await shop.a.names()} - {"one"}
        assert await labels(shop, second) == {
            **given, **SOURCE, "loraplex.dev/model-id": "Second One"
        }  # fmt: skip
        assert await shop.b.names() == []
        write_adapter(root / "one", 2)
        while len(await shop.a.names()) != 2 or (await shop.a.get("one")).version != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "content",
    [
        '{"team": "a"}', '{"env": "x", "team": "a"}', '{"loraplex.dev/model-id": "x"}', "[]", "{",
        '{"env": 1}', '{"env": {}}', '{"env": "\\n"}', "\udcff", "[" * 60_000, " " * 70_000,
    ],
)  # fmt: skip
async def test_a_folder_that_chooses_what_it_may_not_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    root = tmp_path / "d"
    file = write_adapter(root / "one") / LABELS_FILE
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    settings = watching(root, adapter_directory_own_labels=("env",))
    with caplog.at_level(logging.WARNING):
        async with tenants(tmp_path, **settings) as shop:
            await states(shop, refused=1)
            assert await shop.admin.names() == []
            (said,) = [each for each in caplog.records if "is not taken" in each.getMessage()]
            assert LABELS_FILE in said.getMessage()
            file.unlink()
            await states(shop, registered=1, refused=0)
            assert await labels(shop, "one") == SOURCE


async def test_a_folder_sets_the_labels_that_are_left_to_it_and_changes_them(
    tmp_path: Path,
) -> None:
    root = tmp_path / "d"
    file = write_adapter(root / "one") / LABELS_FILE
    file.write_text('{"team": "a"}')
    given = {"env": "test"}
    settings = watching(
        root, adapter_directory_own_labels=("team", "tier"), adapter_directory_labels=given
    )
    async with tenants(tmp_path, **settings) as shop:
        await states(shop, registered=1)
        assert await shop.a.names() == ["one"]
        first = await shop.a.get("one")
        assert dict(first.labels) == {"team": "a", **given, **SOURCE}
        request = pb.LabelAdapterRequest(adapter_id="one", set={"by": "hand", "tier": "1"})
        await shop.admin.adapters.LabelAdapter(request)
        file.write_text('{"team": "b"}')
        await become(shop, "one", {"team": "b", "by": "hand", **given, **SOURCE})
        assert (await shop.a.names(), await shop.b.names()) == ([], ["one"])
        file.unlink()
        await become(shop, "one", {"by": "hand", **given, **SOURCE})
        assert (await shop.admin.get("one")).version == first.version
        assert await shop.b.names() == []


async def test_adapters_of_others_are_not_labelled(tmp_path: Path) -> None:
    root = tmp_path / "d"
    settings = watching(
        root, adapter_directory_own_labels=("tier",), adapter_directory_labels={"team": "b"}
    )
    async with tenants(tmp_path, **settings) as shop:
        await shop.a.register("a-own", labels={"team": "a", "tier": "1"})
        write_adapter(root / "a-own", 0)  # the same bytes
        await states(shop, registered=1)
        assert await labels(shop, "a-own") == {"team": "a", "tier": "1"}
        assert await shop.b.names() == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('adapter_directory_labels = {Team = "a"}', "adapter_directory_labels: a label key"),
        ('adapter_directory_labels = {"loraplex.dev/source" = "a"}', "the server sets itself"),
        ('adapter_directory_own_labels = ["loraplex.dev/model-id"]', "the server sets itself"),
        ('adapter_directory_own_labels = ["A b"]', "adapter_directory_own_labels: a label key"),
        (
            'adapter_directory_own_labels = ["team"]\nadapter_directory_labels = {team = "a"}',
            "is set for all folders",
        ),
    ],
)
def test_labels_that_no_adapter_can_have_are_told_at_the_start(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(file, {})


def test_labels_are_read_from_the_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'adapter_directory_own_labels = ["tier"]\n[adapter_directory_labels]\nteam = "a"\n'
    )
    config = load(file, {})
    assert config.directory_labels.given == {"team": "a"}
    assert config.directory_labels.own == {"tier"}
    monkeypatch.setenv("LORAPLEX_ADAPTER_DIRECTORY_LABELS", '{"team": "b"}')
    monkeypatch.setenv("LORAPLEX_ADAPTER_DIRECTORY_OWN_LABELS", '["env"]')
    config = load(None, {})
    assert config.directory_labels.given == {"team": "b"}
    assert config.directory_labels.own == {"env"}
