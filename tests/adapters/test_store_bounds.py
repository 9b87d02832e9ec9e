"""Lists of any length reach the database as statements of bounded size, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, refusal
from loraplex_adapters.store import Store
from loraplex_adapters.store.index import records

from adapters import stores

pytestmark = pytest.mark.fault("label-keys-unbounded")

TOO_MANY = [f"k{i}" for i in range(260_000)]


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with Store(tmp_path / "store", stores.url(request.param)) as opened:
        yield opened


def test_more_label_keys_than_a_version_may_have_are_a_bad_request(
    store: Store, tmp_path: Path
) -> None:
    store.register("a", stores.adapter(tmp_path / "source"), BASE, labels={"k0": "v"})
    many = dict.fromkeys(TOO_MANY, "v")
    for call in (
        lambda: store.label("a", {}, TOO_MANY),
        lambda: store.label("a", many),
        lambda: store.register("b", tmp_path / "source", BASE, labels=many),
        lambda: store.page(labels=many),
        lambda: list(store.current(many)),
    ):
        assert refusal(call) == ("FIELD_INVALID", "labels")
    assert store.resolve("a").labels == {"k0": "v"}
    assert store.label("a", {}, TOO_MANY[:32]).labels == {}


def test_any_number_of_names_is_listed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_MOST_NAMES", 2)
    names = [f"a{i}" for i in range(5)]
    for name in names:
        store.register(name, stores.adapter(tmp_path / "source"), BASE, labels={"name": name})
        store.set_alias(f"{name}-alias", name)
    asked: list[int] = []
    engine = store._database._engine

    def count(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append(len(parameters))

    sa.event.listen(engine, "before_cursor_execute", count)
    for records_ in (store.page().records, tuple(store.current())):
        assert [r.name for r in records_] == names
        assert [(r.labels["name"], r.aliases) for r in records_] == [
            (name, (f"{name}-alias",)) for name in names
        ]
    for name in names:
        store.delete(name)
    assert [r.name for r in store.deleted()] == names
    assert max(asked) <= 4
