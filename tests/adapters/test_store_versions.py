"""A store of an earlier version is taken over whole, one of a later version is left as it is."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.store import Store, VersionText
from loraplex_adapters.store.index.schema import SCHEMA_VERSION
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.commands.program import app
from typer.testing import CliRunner

from adapters import stores

DATA = Path(__file__).with_name("data")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """A store of the first server that wrote version 2: without the tables that came later."""
    root = tmp_path / "store"
    shutil.copytree(DATA / "store-1" / "blobs", root / "blobs")
    shutil.copy(DATA / "store-2" / "store-id", root)
    with sqlite3.connect(root / "index.sqlite3") as index:
        index.executescript((DATA / "store-2" / "index.sql").read_text())
    return root


def test_a_store_of_the_first_second_version_is_taken_over_whole(
    second: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with Store(second) as store:
            assert [record.id for record in store.versions("a")] == ["a@2", "a@1"]
            assert store.resolve("prod").id == "a@1"
            assert store.resolve("a").labels == {"team": "ops"}
            assert store.resolve("a").base_fingerprint == "sha256:base"
            assert [record.id for record in store.deleted()] == ["gone@1"]
            assert [verified.error for verified in store.verify_all()] == [None, None]
            assert store.quarantined() == {}
    assert (second / "store-id").read_text().strip() == "0123456789abcdef0123456789abcdef"
    with Store(second) as store:
        text = VersionText(eos_token_ids=(1,))
        made, _ = store.register("a", stores.adapter(tmp_path / "new"), BASE, None, True, text=text)
        assert (made.version, made.base_name) == (3, BASE.name)
        assert store.restore("gone").id == "gone@1"


def test_an_older_server_changes_a_store_that_a_newer_one_has_opened(
    second: Path, tmp_path: Path
) -> None:
    """These are the statements of the first server that wrote version 2."""
    with Store(second) as store:
        text = VersionText(eos_token_ids=(1,))
        digest = store.register("b", stores.adapter(tmp_path / "b"), BASE, text=text)[0].digest
        store.quarantine(digest, "it ended the engine")
    with sqlite3.connect(second / "index.sqlite3") as index:
        index.execute("PRAGMA foreign_keys = ON")
        assert index.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == (
            "2",
        )
        index.execute(
            "INSERT INTO versions (name, version, digest, created_at, base_fingerprint) "
            "VALUES ('a', 3, ?, 1.0, 'sha256:base')",
            (digest,),
        )
        index.execute("UPDATE names SET current_version = 3, last_version = 3 WHERE name = 'a'")
        index.execute("DELETE FROM versions WHERE name = 'b'")
        index.execute("DELETE FROM names WHERE name = 'b'")
    with Store(second) as store:
        record = store.resolve("a")
        assert (record.id, record.base_name, record.eos_token_ids) == ("a@3", "", ())
        assert record.quarantine is not None


def test_a_newer_store_is_refused_and_stays_as_it_is(second: Path) -> None:
    with Store(second):
        pass
    newer = str(SCHEMA_VERSION + 1)
    with sqlite3.connect(second / "index.sqlite3") as index:
        index.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (newer,))
        before = list(index.iterdump())
    with pytest.raises(Refusal) as caught:
        Store(second)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert f"newer version of the server: its index is of version {newer}" in caught.value.message
    for command in (["ls"], ["gc"], ["backup", str(second.parent / "backup")]):
        done = CliRunner().invoke(app, ["store", *command, "--store", str(second)])
        assert done.exit_code == 5, command
    with sqlite3.connect(second / "index.sqlite3") as index:
        assert list(index.iterdump()) == before
