"""Links in place of files: followed below the root as in a hub's cache, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from adapters.adapter_files import BASE, write_adapter
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import open_below, open_directory
from loraplex_model.base.refusal import Refusal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SNAPSHOT = "models--acme--support/snapshots/0123abcd"


def cache(root: Path) -> Path:
    """Lays an adapter out as a hub's cache does; returns the snapshot."""
    snapshot = root / SNAPSHOT
    snapshot.mkdir(parents=True)
    blobs = root / "models--acme--support/blobs"
    plain = write_adapter(root / "plain")
    blobs.mkdir()
    for n, name in enumerate((CONFIG, WEIGHTS)):
        (plain / name).rename(blobs / f"{n:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{n:064x}")
    return snapshot


def test_a_snapshot_of_a_hub_s_cache_is_read(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    with open_below(tmp_path, SNAPSHOT) as source:
        digest = inspect(source, BASE).digest
    assert digest == inspect(snapshot, BASE).digest
    with open_below(tmp_path / "models--acme--support", "snapshots/0123abcd") as source:
        assert inspect(source, BASE).digest == digest


LINKS = {
    "an absolute target": "/etc/passwd",
    "an absolute target below the root": "{root}/models--acme--support/blobs/" + "0" * 64,
    "a way out": "../../../../outside",
    "far out": "../" * 40 + "etc/passwd",
    "out and in again": "../../../../{name}/models--acme--support/blobs/" + "0" * 64,
    "nothing": "../../blobs/missing",
    "a directory": "../../blobs",
    "itself": CONFIG,
    "a circle": "circle",
    "a device": "../../../device",
    "below a file": "../../blobs/" + "0" * 64 + "/x",
    "a link out": "out",
    "through a directory that is a link out": "folder/outside",
}


@pytest.mark.parametrize("target", LINKS.values(), ids=LINKS)
def test_a_link_leads_nowhere_but_below_the_root(target: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    snapshot = cache(root)
    (tmp_path / "outside").write_bytes(
        (root / "models--acme--support/blobs" / ("0" * 64)).read_bytes()
    )
    os.mkfifo(root / "device")
    (snapshot / "circle").symlink_to("circle2")
    (snapshot / "circle2").symlink_to("circle")
    (snapshot / "out").symlink_to("../../../../outside")
    (snapshot / "folder").symlink_to("../../../..")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(target.format(root=root, name=root.name))
    with open_below(root, SNAPSHOT) as source, pytest.raises(Refusal) as refused:
        inspect(source, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", CONFIG)
    assert "is a symbolic link" in refused.value.message
    assert "cp -rL" in refused.value.message
    assert str(tmp_path) not in refused.value.message


def test_several_links_and_linked_directories_below_the_root_are_followed(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    (tmp_path / "models--acme--support/stored").symlink_to("blobs")
    (snapshot / "first").symlink_to("../../stored/" + "0" * 64)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to("./first")
    with open_below(tmp_path, SNAPSHOT) as source:
        assert inspect(source, BASE).rank == 4


def test_a_snapshot_given_by_its_path_stays_within_its_repository(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    other = write_adapter(tmp_path / "other") / CONFIG
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(f"../../../other/{CONFIG}")
    assert other.is_file()
    with pytest.raises(Refusal, match="is a symbolic link that leaves"):
        inspect(snapshot, BASE)


def test_a_stored_copy_has_no_links(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    with open_directory(snapshot) as source, pytest.raises(Refusal, match="no links are followed"):
        source.read_config()


@pytest.mark.parametrize("swapped", ["blob", "folder", "link"])
def test_a_link_that_changes_while_it_is_followed_stays_below_the_root(
    swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    snapshot = cache(root)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / ("0" * 64)).write_text('{"secret": 1}')
    blobs = root / "models--acme--support/blobs"
    look, seen = os.lstat, []

    def look_then_swap(name: str, *, dir_fd: int) -> os.stat_result:
        found = look(name, dir_fd=dir_fd)
        if name == {"blob": "0" * 64, "folder": "blobs", "link": CONFIG}[swapped]:
            seen.append(name)
            place = {"blob": blobs / ("0" * 64), "folder": blobs, "link": snapshot / CONFIG}[
                swapped
            ]
            to = secret if swapped == "folder" else secret / ("0" * 64)
            place.rename(tmp_path / "moved")
            place.symlink_to(to)
        return found

    with open_below(root, SNAPSHOT) as source:
        monkeypatch.setattr("loraplex_adapters.format.files.os.lstat", look_then_swap)
        with pytest.raises(Refusal) as refused:
            source.read_config()
    assert seen
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", CONFIG)


def test_descriptors_of_links_are_given_back(tmp_path: Path) -> None:
    snapshot = cache(tmp_path)
    (snapshot / "gone").symlink_to("missing")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with open_below(tmp_path, SNAPSHOT) as source:
            inspect(source, BASE)
            with pytest.raises(Refusal):
                source.open("gone", 10)
        inspect(snapshot, BASE)
    assert len(os.listdir("/proc/self/fd")) == before
