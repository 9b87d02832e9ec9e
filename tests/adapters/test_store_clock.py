"""A clock that is set forward or back while stores are open loses nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from adapters.adapter_files import BASE
from adapters.stores import refusal
from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Reason

from adapters import stores

DAY = 24 * 3600.0


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return stores.adapters(tmp_path, 2)


def set_clock(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Sets the time of day forward (or back) from now; the monotonic clock goes on."""
    true = time.time
    patch.setattr(time, "time", lambda: true() + seconds)


def test_an_upload_that_goes_on_survives_a_clock_that_is_set_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store") as store:
        upload = store.uploads.begin()
        store.uploads.append(upload, CONFIG_FILE, 0, b"{")
        set_clock(monkeypatch, 30 * DAY)
        store.uploads.begin()  # removes what has expired
        assert store.gc().uploads == ()
        assert store.uploads.append(upload, CONFIG_FILE, 1, b"}") == 2
    monkeypatch.undo()
    # A process that starts with the new time cannot know of the jump.
    set_clock(monkeypatch, 30 * DAY)
    with Store(tmp_path / "store") as store:
        assert refusal(store.uploads.state, upload)[0] is Reason.UPLOAD_NOT_FOUND


def test_an_upload_does_not_expire_early_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store") as store:
        upload = store.uploads.begin()
        store.uploads.append(upload, CONFIG_FILE, 0, b"{")
        set_clock(monkeypatch, -30 * DAY)
        store.uploads.begin()
        assert store.uploads.append(upload, CONFIG_FILE, 1, b"}") == 2


@pytest.mark.parametrize("days", [-30, 30])
def test_the_last_deletion_is_undone_whatever_the_clock_says(
    days: float, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store") as store:
        store.register("a", sources[0], BASE)
        store.delete("a")
        set_clock(monkeypatch, days * DAY)
        store.register("a", sources[1], BASE)
        store.delete("a")
        assert store.restore("a").id == "a@2"
        assert [record.version for record in store.versions("a")] == [2]


def test_a_clock_that_is_set_back_collects_nothing_that_was_just_registered(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store") as store:
        digest = store.admit(sources[0], BASE)
        store.register("a", sources[1], BASE)
        store.delete("a")
        set_clock(monkeypatch, -30 * DAY)
        done = store.gc()
        assert (done.versions, done.digests) == ((), ())
        assert store.path(digest).is_dir()
        assert store.restore("a").id == "a@1"
