"""The chat template and the end tokens of a version, on both databases."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.stores import DATABASES, refusal
from loraplex_adapters.store import Store, VersionText
from loraplex_adapters.store.index.texts import MAX_TEMPLATE_BYTES

from adapters import stores

SOURCE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
TEXT = VersionText.of(SOURCE, [5, 3, 5])


@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with Store(tmp_path / "store", stores.url(request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.adapter(tmp_path_factory.mktemp("source") / "adapter")


def test_version_keeps_its_template_and_end_tokens(store: Store, source: Path) -> None:
    store.register("plain", source, BASE)
    made, created = store.register("own", source, BASE, text=TEXT)
    assert created
    assert made.eos_token_ids == (5, 3)
    assert made.chat_template_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert store.resolve("own") == made
    assert store.chat_template(made.chat_template_sha256) == SOURCE
    assert (store.resolve("plain").chat_template_sha256, store.resolve("plain").eos_token_ids) == (
        "",
        (),
    )


def test_same_files_with_another_text_are_another_version(store: Store, source: Path) -> None:
    store.register("a", source, BASE, text=TEXT)
    again, created = store.register("a", source, BASE, text=TEXT)
    assert (again.id, created) == ("a@1", False)
    assert refusal(store.register, "a", source, BASE) == ("ADAPTER_CONFLICT", "a")
    other = VersionText.of(SOURCE, [3])
    moved, created = store.register("a", source, BASE, replace=True, text=other)
    assert (moved.id, created, moved.eos_token_ids) == ("a@2", True, (3,))
    assert store.resolve("a@1").eos_token_ids == (5, 3)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (VersionText.of("x" * (MAX_TEMPLATE_BYTES + 1), []), "chat_template"),
        (VersionText.of("", range(65)), "eos_token_ids"),
        (VersionText.of("", [BASE.config.vocab_size]), "eos_token_ids"),
    ],
)
def test_impossible_texts_are_refused(
    store: Store, source: Path, text: VersionText, field: str
) -> None:
    assert refusal(store.register, "a", source, BASE, text=text) == ("FIELD_INVALID", field)
    assert not list(store.current())


def test_collection_removes_templates_that_no_version_has(store: Store, source: Path) -> None:
    first, _ = store.register("a", source, BASE, text=TEXT)
    store.register("b", source, BASE, text=TEXT)
    store.delete("a")
    store.gc(grace_seconds=0)
    assert store.chat_template(first.chat_template_sha256) == SOURCE
    store.delete("b")
    store.restore("b")
    assert store.resolve("b").eos_token_ids == (5, 3)
    store.delete("b")
    store.gc(grace_seconds=0)
    assert refusal(store.chat_template, first.chat_template_sha256)[0] == "ADAPTER_CORRUPT"


def test_index_of_an_older_server_gets_the_tables(tmp_path: Path, source: Path) -> None:
    with Store(tmp_path / "store") as store:
        store.register("a", source, BASE)
    index = tmp_path / "store" / "index.sqlite3"
    with sqlite3.connect(index) as database:
        database.execute("DROP TABLE version_texts")
        database.execute("DROP TABLE chat_templates")
    with Store(tmp_path / "store") as store:
        assert store.resolve("a").eos_token_ids == ()
        assert store.register("b", source, BASE, text=TEXT)[0].eos_token_ids == (5, 3)


def test_damaged_template_is_not_used(tmp_path: Path, source: Path) -> None:
    with Store(tmp_path / "store") as store:
        made, _ = store.register("a", source, BASE, text=TEXT)
        with sqlite3.connect(tmp_path / "store" / "index.sqlite3") as database:
            database.execute("UPDATE chat_templates SET source = 'other'")
        assert refusal(store.chat_template, made.chat_template_sha256)[0] == "ADAPTER_CORRUPT"
