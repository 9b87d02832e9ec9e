"""Files of `durable` after a loss of power; writers that flush too little are noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from loraplex_model.base.durable import flush, make_directory, write_atomically
from power.recorder import Recorder
from power.replay import replay

OLD, NEW = b"old" * 100, b"something new" * 100


def write_without_flush(path: Path) -> None:
    path.write_bytes(NEW)


def write_without_the_name(path: Path) -> None:
    path.write_bytes(NEW)
    flush(path)


def rename_without_flush(path: Path) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(NEW)
    fresh.rename(path)
    flush(path.parent)


def rename_without_the_name(path: Path) -> None:
    write_atomically(path, NEW)


def in_a_folder_without_its_name(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, NEW)
    flush(path.parent)


def whole(path: Path) -> None:
    make_directory(path.parent)
    write_atomically(path, NEW)
    flush(path.parent)


def lost(top: Path, place: str, write: Callable[[Path], None]) -> int:
    """Number of states in which a file written at `place` is not what it may be."""
    recorder = Recorder(top)
    with recorder.recording():
        write(top / place)
        recorder.acknowledge("written")
    wrong = 0

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        nonlocal wrong
        file = left / place
        found = file.read_bytes() if file.exists() else OLD
        wrong += found not in ((NEW,) if acknowledged else (OLD, NEW))

    assert replay(recorder.moments, check) > 1
    return wrong


@pytest.mark.fault("power-cut")
@pytest.mark.parametrize("place", ["file", "a/file", "a/b/file"])
def test_a_file_that_was_written_survives_a_loss_of_power(place: str, tmp_path: Path) -> None:
    assert lost(tmp_path, place, whole) == 0


@pytest.mark.fault("power-cut")
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    assert lost(tmp_path, "file", whole) == 0


@pytest.mark.parametrize(
    ("write", "place"),
    [
        (write_without_flush, "file"),
        (write_without_the_name, "file"),
        (rename_without_flush, "file"),
        (rename_without_the_name, "file"),
        (in_a_folder_without_its_name, "a/file"),
    ],
)
def test_a_writer_that_flushes_too_little_is_noticed(
    write: Callable[[Path], None], place: str, tmp_path: Path
) -> None:
    assert lost(tmp_path, place, write) > 0
