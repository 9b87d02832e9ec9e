"""Names, aliases, labels and deletions behave the same on both databases and across schemas."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, refusal
from loraplex_adapters.store import Store, staging

from adapters import stores

DATA = Path(__file__).parent / "data" / "store-1"


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    return stores.url(request.param)


@pytest.fixture
def store(tmp_path: Path, url: str) -> Any:
    with Store(tmp_path / "store", url) as opened:
        yield opened


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stores.adapters(tmp_path_factory.mktemp("sources"), 3)


def test_versions_pages_and_deletions_are_the_same_on_every_database(
    store: Store, sources: list[Path]
) -> None:
    for name in ("b", "a-1", "a", "a0"):
        store.register(name, sources[0], BASE)
    second, created = store.register("b", sources[1], BASE, replace=True)
    assert (second.id, created) == ("b@2", True)
    assert refusal(store.register, "b", sources[2], BASE) == ("ADAPTER_CONFLICT", "b")
    assert [r.id for r in store.page(2).records] == ["a@1", "a-1@1"]
    assert [r.id for r in store.page(2, "a-1").records] == ["a0@1", "b@2"]
    assert [r.id for r in store.versions("b")] == ["b@2", "b@1"]
    store.delete("b")
    assert refusal(store.versions, "b") == ("ADAPTER_NOT_FOUND", "b")
    assert refusal(store.resolve, "b@1") == ("ADAPTER_NOT_FOUND", "b@1")
    assert store.register("b", sources[0], BASE)[0].id == "b@3"


def test_everything_is_there_again_after_reopening(
    tmp_path: Path, url: str, sources: list[Path]
) -> None:
    with Store(tmp_path / "s", url) as store:
        store.register("a", sources[0], BASE, labels={"team": "ops"})
        store.set_alias("prod", "a")
        before = store.resolve("prod")
    with Store(tmp_path / "s", url) as store:
        assert store.resolve("prod") == before
        assert (before.labels, before.aliases) == ({"team": "ops"}, ("prod",))
        store.verify(before.digest)


def test_provenance_and_the_base_are_kept_with_the_version(
    store: Store, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = staging.inspect

    def stamped(*args: Any) -> Any:
        return replace(real(*args), virtual_tokens=8, provenance={"trainer": "t", "data": "d"})

    monkeypatch.setattr(staging, "inspect", stamped)
    store.register("a", sources[0], BASE)
    kept = store.resolve("a")
    assert kept.provenance == {"trainer": "t", "data": "d"}
    assert (kept.virtual_tokens, kept.base_fingerprint) == (8, BASE.fingerprint)


def test_an_alias_resolves_like_a_name_until_it_is_moved(store: Store, sources: list[Path]) -> None:
    first, _ = store.register("a", sources[0], BASE)
    made = store.set_alias("prod", "a")
    assert (made.alias, made.name, made.version, made.digest) == ("prod", "a", 1, first.digest)
    second, _ = store.register("a", sources[1], BASE, replace=True)
    assert store.resolve("prod").id == "a@1", "a version, not a name, is what it points to"
    assert store.resolve(f"prod@{first.digest}").id == "a@1"
    for other in (f"prod@{second.digest}", "prod@1"):
        assert refusal(store.resolve, other) == ("ADAPTER_NOT_FOUND", other)
    assert store.set_alias("prod", "a").version == 2
    assert store.resolve("prod") == store.resolve("a@2")
    assert store.resolve("a").aliases == ("prod",)
    assert store.resolve("a@1").aliases == ()
    assert store.set_alias("also", "prod").version == 2, "an alias of an alias is one of its target"
    assert [(a.alias, a.version) for a in store.aliases()] == [("also", 2), ("prod", 2)]
    store.delete_alias("prod")
    assert refusal(store.resolve, "prod") == ("ADAPTER_NOT_FOUND", "prod")
    assert refusal(store.delete_alias, "prod") == ("ADAPTER_NOT_FOUND", "prod")
    assert store.resolve("also").id == "a@2"


def test_an_alias_and_a_name_cannot_be_the_same(store: Store, sources: list[Path]) -> None:
    store.register("a", sources[0], BASE)
    store.register("b", sources[1], BASE)
    assert refusal(store.set_alias, "b", "a") == ("ADAPTER_CONFLICT", "b")
    store.set_alias("prod", "a")
    assert refusal(store.register, "prod", sources[2], BASE) == ("ADAPTER_CONFLICT", "prod")
    assert refusal(store.set_alias, "no_alias", "a") == ("FIELD_INVALID", "name")
    assert refusal(store.set_alias, "x", "../a") == ("FIELD_INVALID", "adapter_id")
    assert refusal(store.set_alias, "x", "c") == ("ADAPTER_NOT_FOUND", "c")
    store.delete("b")
    store.set_alias("b", "a")
    assert refusal(store.restore, "b") == ("ADAPTER_CONFLICT", "b")


def test_an_alias_moves_only_from_where_it_was_expected(store: Store, sources: list[Path]) -> None:
    first, _ = store.register("a", sources[0], BASE)
    store.register("a", sources[1], BASE, replace=True)
    conflict = ("ADAPTER_CONFLICT", "prod")
    assert refusal(store.set_alias, "prod", "a@1", "a@1") == conflict, "it points nowhere yet"
    assert store.set_alias("prod", "a@1", "").version == 1
    assert refusal(store.set_alias, "prod", "a@2", "") == conflict, "it exists now"
    for wrong in ("a", "a@2", "b@1", "b"):
        assert refusal(store.set_alias, "prod", "a@2", wrong) == conflict
    assert store.resolve("prod").version == 1
    assert store.set_alias("prod", "a@2", f"a@{first.digest}").version == 2
    assert store.set_alias("prod", "a@1", "a").version == 1


def test_of_many_who_move_an_alias_from_one_place_one_does(
    store: Store, sources: list[Path]
) -> None:
    store.register("a", sources[0], BASE)
    store.register("a", sources[1], BASE, replace=True)
    store.set_alias("prod", "a@1")
    ready = threading.Barrier(4)

    def move(_: int) -> str:
        ready.wait()
        try:
            return f"moved to {store.set_alias('prod', 'a@2', 'a@1').version}"
        except Exception as error:
            return getattr(error, "reason", repr(error))

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(move, range(4)))
    assert outcomes == [*["ADAPTER_CONFLICT"] * 3, "moved to 2"]


def test_a_listing_shows_only_what_carries_all_labels(store: Store, sources: list[Path]) -> None:
    store.register("a", sources[0], BASE, labels={"team": "ops", "lang": "de"})
    store.register("b", sources[0], BASE, labels={"team": "ops"})
    store.register("c", sources[0], BASE)
    store.register("d", sources[0], BASE, labels={"team": "ops"})
    store.register("d", sources[1], BASE, replace=True)

    def listed(**labels: str) -> list[str]:
        return [r.id for r in store.page(labels=labels).records]

    assert listed(team="ops") == ["a@1", "b@1"]
    assert listed(team="ops", lang="de") == ["a@1"]
    assert listed(team="dev") == []
    page = store.page(1, labels={"team": "ops"})
    assert [r.id for r in store.page(1, page.next_page_token, {"team": "ops"}).records] == ["b@1"]


def test_labels_are_put_on_and_taken_off(store: Store, sources: list[Path]) -> None:
    store.register("a", sources[0], BASE, labels={"team": "ops", "stage": "test"})
    same, created = store.register("a", sources[0], BASE, labels={"stage": "prod"})
    assert not created
    assert same.labels == {"stage": "prod", "team": "ops"}
    store.set_alias("prod", "a")
    assert store.label("prod", {"eval/score": "0.9"}, ["team", "none"]).labels == {
        "eval/score": "0.9",
        "stage": "prod",
    }
    assert store.resolve("a").labels == {"eval/score": "0.9", "stage": "prod"}
    assert refusal(store.label, "b", {}) == ("ADAPTER_NOT_FOUND", "b")


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"A": "x"},
        {"-a": "x"},
        {"a b": "x"},
        {"a\n": "x"},
        {"a" * 64: "x"},
        {"a": "x" * 257},
        {"a": "\0"},
        {f"k{n}": "x" for n in range(33)},
    ],
    ids=lambda labels: ascii(labels)[:30],
)
def test_labels_are_bounded(labels: dict[str, str], tmp_path: Path, sources: list[Path]) -> None:
    with Store(tmp_path / "store") as store:
        invalid = ("FIELD_INVALID", "labels")
        assert refusal(store.register, "a", sources[0], BASE, labels=labels) == invalid
        assert refusal(store.page, labels=labels) == invalid
        store.register("a", sources[0], BASE, labels={f"a{n}": "x" for n in range(31)})
        assert refusal(store.label, "a", labels) == invalid
        assert refusal(store.label, "a", {"b": "x", "c": "x"}) == invalid
        assert len(store.label("a", {"b": "x", "c": "x"}, ["a0"]).labels) == 32


def test_a_deletion_can_be_taken_back_with_its_aliases(store: Store, sources: list[Path]) -> None:
    store.register("a", sources[0], BASE, labels={"team": "ops"})
    current, _ = store.register("a", sources[1], BASE, replace=True)
    store.set_alias("prod", "a@1")
    assert refusal(store.restore, "a") == ("ADAPTER_CONFLICT", "a")
    assert refusal(store.restore, "b") == ("ADAPTER_NOT_FOUND", "b")
    store.delete("a")
    for gone in ("a", "a@1", "prod", f"a@{current.digest}"):
        assert refusal(store.resolve, gone) == ("ADAPTER_NOT_FOUND", gone)
    gone = store.deleted()
    assert [r.id for r in gone] == ["a@1", "a@2"]
    assert all(r.deleted_at is not None and r.deleted_at <= datetime.now(UTC) for r in gone)
    assert refusal(store.label, "a", {}) == ("ADAPTER_NOT_FOUND", "a")
    assert store.restore("a") == current == store.resolve("a")
    assert store.resolve("prod").id == "a@1"
    assert store.resolve("a@1").labels == {"team": "ops"}
    assert store.deleted() == ()


def test_only_the_last_deletion_is_taken_back(store: Store, sources: list[Path]) -> None:
    store.register("a", sources[0], BASE)
    store.delete("a")
    store.register("a", sources[1], BASE)
    assert refusal(store.restore, "a") == ("ADAPTER_CONFLICT", "a")
    store.delete("a")
    assert store.restore("a").id == "a@2"
    assert refusal(store.resolve, "a@1")[0] == "ADAPTER_NOT_FOUND"
    assert [r.id for r in store.deleted()] == ["a@1"]


def test_two_replicas_share_names_and_bytes(tmp_path: Path, url: str, sources: list[Path]) -> None:
    with Store(tmp_path / "s", url) as one, Store(tmp_path / "s", url) as two:
        made, _ = one.register("a", sources[0], BASE)
        assert two.resolve("a") == made
        two.verify(made.digest)
        with ThreadPoolExecutor(6) as pool:
            results = list(
                pool.map(
                    lambda n: (one, two)[n % 2].register("b", sources[n % 3], BASE, replace=True),
                    range(24),
                )
            )
        versions = sorted(record.version for record, created in results if created)
        assert versions == list(range(1, len(versions) + 1))
        assert one.get("b") == two.get("b")
        assert all(verified.error is None for verified in two.verify_all())


def first_schema(root: Path) -> None:
    shutil.copytree(DATA / "blobs", root / "blobs")
    with sqlite3.connect(root / "index.sqlite3") as connection:
        connection.executescript((DATA / "index.sql").read_text())


def test_a_store_of_the_first_schema_is_taken_over_whole(
    tmp_path: Path, sources: list[Path]
) -> None:
    first_schema(tmp_path)
    for _ in range(2):
        with Store(tmp_path) as store:
            assert [r.id for r in store.page().records] == ["a@2", "b@1"]
            assert [r.id for r in store.versions("a")] == ["a@2", "a@1"]
            one, two = store.resolve("b"), store.resolve("a")
            assert one.digest == store.resolve("a@1").digest
            assert (two.rank, two.peft_type, two.base_model) == (1, "LORA", "tiny")
            assert (two.labels, two.aliases, two.provenance, two.base_fingerprint) == (
                {},
                (),
                {},
                "",
            )
            assert two.created_at == datetime.fromtimestamp(1795319528.3339446, UTC)
            assert [v.error for v in store.verify_all()] == [None, None]
            assert refusal(store.resolve, "gone")[0] == "ADAPTER_NOT_FOUND"
    with Store(tmp_path) as store:
        assert store.register("gone", sources[0], BASE)[0].version == 3
        store.set_alias("prod", "a@1")
        assert store.gc(0).digests == (
            "sha256:80f6a5f60c66b0159d773a6151ddfaf158ca989a3089a68ecd37ba6cfa049580",
        )
        assert [v.error for v in store.verify_all()] == [None] * 3
    with sqlite3.connect(tmp_path / "index.sqlite3") as connection:
        # A server of the first schema asks this, and leaves anything but 0 and 1 alone.
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)


def test_an_index_that_is_not_this_directorys_is_refused(
    tmp_path: Path, sources: list[Path]
) -> None:
    with Store(tmp_path / "one") as store:
        store.register("a", sources[0], BASE)
    with Store(tmp_path / "two"):
        pass
    shutil.copy(tmp_path / "two" / "index.sqlite3", tmp_path / "one" / "index.sqlite3")
    assert refusal(Store, tmp_path / "one")[0] == "STORE_UNAVAILABLE"
    (tmp_path / "one" / "index.sqlite3").unlink()
    assert refusal(Store, tmp_path / "one")[0] == "STORE_UNAVAILABLE", "lost, with bytes to lose"
    (tmp_path / "one" / "store-id").unlink()
    with Store(tmp_path / "one") as store:
        assert store.page().records == ()


@pytest.mark.parametrize(
    "address",
    ["mysql://secret@host/x", "sqlite:///x", "no url secret", "postgresql://u:secret@%%:x/y"],
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(
    address: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="store_url") as refused:
        Store(tmp_path / "s", address)
    assert refusal(Store, tmp_path / "s", address)[0] == "STORE_UNAVAILABLE"
    assert "secret" not in str(refused.value)


def test_a_database_that_does_not_answer_is_a_typed_error(tmp_path: Path) -> None:
    address = f"postgresql+psycopg://nobody@/none?host={tmp_path}"
    assert refusal(Store, tmp_path / "s", address)[0] == "STORE_UNAVAILABLE"


def test_a_lost_connection_is_an_error_once(tmp_path: Path, sources: list[Path]) -> None:
    address = stores.url("postgresql")
    with Store(tmp_path / "s", address) as store:
        store.register("a", sources[0], BASE)
        engine = sa.create_engine(address)
        with engine.connect() as admin:
            admin.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        engine.dispose()
        assert store.resolve("a").id == "a@1"


def test_the_change_counter_grows_with_every_change_by_anybody(
    tmp_path: Path, url: str, sources: list[Path]
) -> None:
    with Store(tmp_path / "s", url) as store, Store(tmp_path / "s", url) as other:
        seen = [other.change_counter()]
        for change in (
            lambda: store.register("a", sources[0], BASE),
            lambda: store.register("a", sources[0], BASE, labels={"k": "v"}),
            lambda: store.register("a", sources[1], BASE, replace=True),
            lambda: store.set_alias("prod", "a@1"),
            lambda: store.label("a", {}, ["k"]),
            lambda: store.delete_alias("prod"),
            lambda: store.delete("a"),
            lambda: store.restore("a"),
        ):
            change()
            seen.append(other.change_counter())
        assert seen == sorted(set(seen))
        for _ in range(2):  # what changes nothing
            store.register("a", sources[1], BASE)
            store.set_alias("same", "a")
            last = other.change_counter()
        assert other.change_counter() == last == seen[-1] + 1
