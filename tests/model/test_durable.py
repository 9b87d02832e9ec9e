"""Files are written whole or not at all, and locks exclude other holders."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from loraplex_model.base.durable import flush, lock, locked, read_regular, write_atomically


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"a longer old content")
    write_atomically(path, b"new", mode=0o600)
    flush(path)
    flush(tmp_path)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_excludes_others_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock(path)
    with pytest.raises(BlockingIOError):
        lock(path, wait=False)
    entered = threading.Event()

    def wait() -> None:
        with locked(path):
            entered.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not entered.wait(0.05)
    os.close(held)
    waiter.join(10)
    assert entered.is_set()
    os.close(lock(path, wait=False))


@pytest.mark.timeout(20)  # a reader would wait for a writer
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_what_is_no_regular_file_is_an_error_at_once(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
        read_regular(tmp_path / "file")
