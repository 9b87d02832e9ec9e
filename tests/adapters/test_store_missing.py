"""Files of one adapter that are gone or are something else: the store and the others go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters.adapter_files import BASE
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.store import Store

from adapters import stores

pytestmark = pytest.mark.fault("blob-missing-at-start")


def gone(blob: Path) -> None:
    shutil.rmtree(blob)


def no_weights(blob: Path) -> None:
    (blob / WEIGHTS_FILE).unlink()


def empty_weights(blob: Path) -> None:
    no_weights(blob)
    (blob / WEIGHTS_FILE).touch()


def config_is_a_directory(blob: Path) -> None:
    (blob / CONFIG_FILE).unlink()
    (blob / CONFIG_FILE).mkdir()


def weights_are_a_link(blob: Path) -> None:
    (blob / WEIGHTS_FILE).rename(blob.parent.parent / "elsewhere")
    (blob / WEIGHTS_FILE).symlink_to(blob.parent.parent / "elsewhere")


def a_file(blob: Path) -> None:
    shutil.rmtree(blob)
    blob.write_text("not a directory")


def a_link_to_nothing(blob: Path) -> None:
    shutil.rmtree(blob)
    blob.symlink_to(blob.parent / "nothing")


def a_link_to_itself(blob: Path) -> None:
    shutil.rmtree(blob)
    blob.symlink_to(blob)


def a_link_to_a_copy(blob: Path) -> None:
    blob.rename(blob.parent.parent / "elsewhere")
    blob.symlink_to(blob.parent.parent / "elsewhere")


DAMAGE = [
    gone,
    no_weights,
    empty_weights,
    config_is_a_directory,
    weights_are_a_link,
    a_file,
    a_link_to_nothing,
    a_link_to_itself,
    a_link_to_a_copy,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_store_opens_reports_missing_files_and_is_repaired(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    sources = stores.adapters(tmp_path, 2)
    root = tmp_path / "store"
    with Store(root) as store:
        hurt = store.register("hurt", sources[0], BASE)[0]
        sound = store.register("sound", sources[1], BASE)[0]
        store.set_alias("prod", "hurt")
    damage(root / "blobs" / "sha256" / hurt.digest.removeprefix("sha256:"))
    with Store(root) as store:
        errors = {v.digest: v.error for v in store.verify_all()}
        assert errors[sound.digest] is None
        error = errors[hurt.digest]
        assert error is not None
        assert error.reason == "ADAPTER_CORRUPT"
        assert {s.name: s.is_stored for s in store.survey()} == {"hurt": False, "sound": True}
        assert store.resolve("prod").digest == hurt.digest
        assert store.gc(0).digests == ()
        before = store.change_counter()
        again, created = store.register("hurt", sources[0], BASE)
        assert (again, created) == (store.resolve("hurt"), False)
        assert store.change_counter() > before, "servers must notice that it is whole again"
        assert [v.error for v in store.verify_all()] == [None, None]
        assert all(s.is_stored for s in store.survey())
        assert not stores.rubbish(root)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_deleted_and_collected(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    (source,) = stores.adapters(tmp_path, 1)
    root = tmp_path / "store"
    with Store(root) as store:
        hurt = store.register("hurt", source, BASE)[0]
        damage(root / "blobs" / "sha256" / hurt.digest.removeprefix("sha256:"))
        store.delete("hurt")
        assert store.gc(0).versions == ("hurt@1",)
        assert not list((root / "blobs" / "sha256").iterdir())
        assert not stores.rubbish(root)
        assert list(store.verify_all()) == []
