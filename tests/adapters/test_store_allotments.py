"""What a principal may have in the store, on both databases, whoever registers at the same time."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, refusal
from loraplex_adapters.store import Allotment, Holding, LabelSelector, Store
from loraplex_model.base.refusal import Reason, Refusal

from adapters import stores

SEARCH = {"team": "search"}
OF_SEARCH = LabelSelector.parse("team=search")


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> str:
    return stores.url(request.param)


@pytest.fixture
def store(tmp_path: Path, url: str) -> Any:
    with Store(tmp_path / "store", url) as opened:
        yield opened


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return stores.adapters(tmp_path_factory.mktemp("sources"), 4)


def allotment(adapters: int | None = None, nbytes: int | None = None, **more: Any) -> Allotment:
    return Allotment("search", OF_SEARCH, adapters, nbytes, **more)


def test_the_number_of_adapters_is_that_of_current_versions_that_the_selector_matches(
    store: Store, sources: list[Path]
) -> None:
    two = allotment(adapters=2)
    store.register("other", sources[0], BASE)
    store.register("a", sources[0], BASE, labels=SEARCH, allotment=two)
    store.register("b", sources[1], BASE, labels=SEARCH, allotment=two)
    with pytest.raises(Refusal) as caught:
        store.register("c", sources[2], BASE, labels=SEARCH, allotment=two)
    assert caught.value.reason is Reason.QUOTA_EXCEEDED
    assert caught.value.field == "adapters"
    assert caught.value.subject.name == "principal:search"
    assert "may have 2 adapters and has 2" in caught.value.message
    # A new version, the same content again and an adapter of others do not change the number.
    store.register("b", sources[2], BASE, replace=True, labels=SEARCH, allotment=two)
    store.register("b", sources[2], BASE, labels=SEARCH, allotment=two)
    store.register("d", sources[3], BASE, labels={"team": "ads"}, allotment=two)
    store.delete("a")
    store.register("c", sources[3], BASE, labels=SEARCH, allotment=two)
    assert refusal(store.restore, "a", allotment=two) == ("QUOTA_EXCEEDED", "adapters")
    assert store.restore("a").id == "a@1"


def test_bytes_are_those_of_current_versions_and_a_replacement_counts_the_difference(
    store: Store, sources: list[Path]
) -> None:
    size = store.register("a", sources[0], BASE, labels=SEARCH)[0].size_bytes
    assert store.allotments.held(allotment()) == Holding(1, size)
    room = allotment(nbytes=2 * size)
    store.register("b", sources[0], BASE, labels=SEARCH, allotment=room)  # counts twice
    assert store.allotments.held(room) == Holding(2, 2 * size)
    assert refusal(
        store.register, "c", sources[1], BASE, labels=SEARCH, allotment=room
    ) == ("QUOTA_EXCEEDED", "store_bytes")  # fmt: skip
    store.register("b", sources[1], BASE, replace=True, labels=SEARCH, allotment=room)
    assert store.allotments.held(room) == Holding(2, 2 * size)
    store.delete("a")
    arriving = allotment(nbytes=2 * size, arriving_bytes=1)
    assert refusal(
        store.register, "c", sources[2], BASE, labels=SEARCH, allotment=arriving
    ) == ("QUOTA_EXCEEDED", "store_bytes")  # fmt: skip
    store.register("c", sources[2], BASE, labels=SEARCH, allotment=room)


def test_a_lowered_limit_keeps_what_is_there_and_lets_it_be_replaced(
    store: Store, sources: list[Path]
) -> None:
    for number, name in enumerate("abc"):
        store.register(name, sources[number], BASE, labels=SEARCH)
    one = allotment(adapters=1, nbytes=1)
    store.register("a", sources[3], BASE, replace=True, labels=SEARCH, allotment=one)
    store.register("b", sources[1], BASE, labels=SEARCH, allotment=one)
    assert refusal(
        store.register, "d", sources[0], BASE, labels=SEARCH, allotment=one
    ) == ("QUOTA_EXCEEDED", "adapters")  # fmt: skip


def test_labels_that_bring_known_content_into_the_selector_count(
    store: Store, sources: list[Path]
) -> None:
    store.register("a", sources[0], BASE)
    none = allotment(adapters=0)
    assert refusal(
        store.register, "a", sources[0], BASE, labels=SEARCH, allotment=none
    ) == ("QUOTA_EXCEEDED", "adapters")  # fmt: skip
    assert store.get("a").labels == {}


def test_a_refusal_changes_nothing(store: Store, sources: list[Path]) -> None:
    before = store.change_counter()
    refusal(store.register, "a", sources[0], BASE, labels=SEARCH, allotment=allotment(adapters=0))
    assert store.change_counter() == before
    assert not store.page().records
    store.register("a", sources[0], BASE)
    store.delete("a")
    everything = Allotment("ops", LabelSelector(), adapters=0)
    before = store.change_counter()
    refusal(store.restore, "a", allotment=everything)
    assert store.change_counter() == before
    assert [record.id for record in store.deleted()] == ["a@1"]


def test_registrations_at_the_same_time_do_not_exceed_it(
    tmp_path: Path, url: str, sources: list[Path]
) -> None:
    """Each thread has a store of its own, as servers that share one have."""
    three = allotment(adapters=3)

    def register(number: int) -> bool:
        with Store(tmp_path / "store", url) as own:
            try:
                own.register(
                    f"a{number}", sources[number % 4], BASE, labels=SEARCH, allotment=three
                )
            except Refusal as error:
                return error.reason is not Reason.QUOTA_EXCEEDED
        return True

    with Store(tmp_path / "store", url) as store, ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(register, range(12))) == 3
        assert store.allotments.held(three).adapters == 3


def test_an_early_refusal_is_that_of_the_registration(store: Store, sources: list[Path]) -> None:
    size = store.register("a", sources[0], BASE, labels=SEARCH)[0].size_bytes
    require = store.allotments.require
    tight = allotment(adapters=1, nbytes=size)
    require(tight, "a", SEARCH, size)
    require(tight, "b", {"team": "ads"}, size)
    assert refusal(require, tight, "b", SEARCH) == ("QUOTA_EXCEEDED", "adapters")
    assert refusal(require, tight, "a", SEARCH, size + 1) == ("QUOTA_EXCEEDED", "store_bytes")


def test_a_damaged_description_counts_as_nothing_and_stops_nobody(
    tmp_path: Path, sources: list[Path]
) -> None:
    with Store(tmp_path / "store") as store:
        size = store.register("a", sources[0], BASE, labels=SEARCH)[0].size_bytes
        broken = store.register("b", sources[1], BASE, labels=SEARCH)[0].digest
        with sqlite3.connect(tmp_path / "store" / "index.sqlite3") as index:
            index.execute("UPDATE blobs SET summary = '{\"size' WHERE digest = ?", (broken,))
        index.close()
        room = allotment(nbytes=2 * size)
        assert store.allotments.held(room) == Holding(2, size)
        store.register("c", sources[2], BASE, labels=SEARCH, allotment=room)


@pytest.mark.parametrize("selector", ["", "team=search", "team in (search, ads), !retired", "team"])
def test_what_is_held_is_what_a_listing_shows(
    store: Store, sources: list[Path], selector: str
) -> None:
    labels = [SEARCH, {"team": "ads"}, {"team": "search", "retired": ""}, {}]
    for number, each in enumerate(labels):
        store.register(f"a{number}", sources[number], BASE, labels=each)
        store.register(f"a{number}", sources[(number + 1) % 4], BASE, replace=True, labels=each)
    store.register("gone", sources[0], BASE, labels=SEARCH)
    store.delete("gone")
    parsed = LabelSelector.parse(selector)
    shown = [record for record in store.current() if parsed.matches(record.labels)]
    expected = Holding(len(shown), sum(record.size_bytes for record in shown))
    assert store.allotments.held(Allotment("x", parsed)) == expected
