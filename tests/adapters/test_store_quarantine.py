"""Quarantine of content: for every name, after a restart, and in indexes of older servers."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, refusal
from loraplex_adapters.store import Store

from adapters import stores

pytestmark = pytest.mark.fault("adapter-kills-engines")


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    return stores.url(request.param)


@pytest.fixture
def store(tmp_path: Path, url: str) -> Any:
    with Store(tmp_path / "store", url) as opened:
        yield opened


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stores.adapters(tmp_path_factory.mktemp("sources"), 2)


def test_a_quarantine_holds_for_every_name_until_it_is_released(
    store: Store, tmp_path: Path, url: str, sources: list[Path]
) -> None:
    held = store.register("a", sources[0], BASE)[0]
    store.register("same", sources[0], BASE)
    store.register("other", sources[1], BASE)
    before = store.change_counter()
    assert store.quarantine(held.digest, "it ended the engine")
    assert not store.quarantine(held.digest, "again")
    assert store.change_counter() == before + 1
    with Store(tmp_path / "store", url) as another:
        assert {r.name: r.quarantine and r.quarantine.reason for r in another.current()} == {
            "a": "it ended the engine",
            "same": "it ended the engine",
            "other": None,
        }
        (listed,) = another.quarantined().values()
        assert (listed.digest, listed) == (held.digest, another.resolve("a").quarantine)
    assert store.release(held.digest)
    assert not store.release(held.digest)
    assert store.change_counter() == before + 2
    assert store.resolve("a").quarantine is None
    assert not store.quarantined()


def test_content_that_is_collected_and_registered_again_is_still_quarantined(
    store: Store, sources: list[Path]
) -> None:
    digest = store.register("a", sources[0], BASE)[0].digest
    store.quarantine(digest, "it ended the engine")
    store.delete("a")
    assert store.gc(0).digests == (digest,)
    again = store.register("b", sources[0], BASE)[0]
    assert again.quarantine is not None


def test_what_is_no_digest_cannot_be_quarantined(store: Store) -> None:
    assert refusal(store.quarantine, "a", "why")[0] == "FIELD_INVALID"
    assert refusal(store.release, "a")[0] == "FIELD_INVALID"


def test_an_index_from_before_quarantines_is_extended(
    tmp_path: Path, url: str, sources: list[Path]
) -> None:
    root = tmp_path / "old"
    with Store(root, url) as store:
        digest = store.register("a", sources[0], BASE)[0].digest
    statements = (
        "DROP TABLE quarantine",
        "DROP TABLE rebases",
        "ALTER TABLE versions DROP COLUMN base_name",
    )
    if url:
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
        engine.dispose()
    else:
        with sqlite3.connect(root / "index.sqlite3") as file:
            for statement in statements:
                file.execute(statement)
    for _ in range(2):
        with Store(root, url) as store:
            assert store.resolve("a").base_name == ""
            store.quarantine(digest, "it ended the engine")
            assert store.quarantined().keys() == {digest}
