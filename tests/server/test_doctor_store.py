"""`doctor` looks at the adapters of the store, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_files import BASE
from loraplex_adapters.store import Store
from loraplex_model.checkpoints.load import known_fingerprint, load_base
from loraplex_server.commands import doctor
from loraplex_server.config import Config

from adapters import stores
from model import tiny

pytestmark = pytest.mark.fault("base-changed-under-store")


def said(folder: Path, **settings: Any) -> list[doctor.Check]:
    config = Config(store=folder / "store", cache=folder / "cache", **settings)
    return [c for c in doctor.examine(config) if c.subject == "adapters"]


def content(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


def test_doctor_counts_adapters_that_will_not_be_served(tmp_path: Path) -> None:
    assert said(tmp_path) == []
    sources = stores.adapters(tmp_path, 4)
    model = tiny.write("llama", tmp_path / "model")
    with Store(tmp_path / "store") as store:
        held = store.register("held", sources[0], BASE)[0]
        store.quarantine(held.digest, "it ended the engine")
        lost = store.register("lost", sources[1], BASE)[0]
        store.register("other", sources[2], BASE.named("models/first"))
    shutil.rmtree(tmp_path / "store" / "blobs" / "sha256" / lost.digest[7:])
    before = content(tmp_path)
    first, *rest = said(tmp_path, model=str(model))
    assert first.good
    assert "3 versions in use, 1 quarantined; their base is compared once" in first.text
    assert [(c.good, c.text) for c in rest] == [(False, "1 have no files in the store: lost@1")]
    assert content(tmp_path) == before

    base = load_base(str(model), torch.float32, tmp_path / "cache").weights.info
    assert known_fingerprint(str(model), tmp_path / "cache") == base.fingerprint
    _, *rest = said(tmp_path, model=str(model))
    texts = [c.text for c in rest]
    assert any("1 were registered for first (" in text and "other@1" in text for text in texts)
    assert any("held@1, lost@1" in text for text in texts)
    assert not any(c.good for c in rest)


def test_doctor_reports_an_index_that_cannot_be_read_or_is_old(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "index.sqlite3").write_bytes(b"not a database " * 1000)
    (check,) = said(tmp_path)
    assert not check.good
    assert check.text == "the adapter store's index cannot be used: file is not a database"
    (root / "index.sqlite3").write_bytes(b"")
    (check,) = said(tmp_path)
    assert check.good
    assert "brought up to date" in check.text
