"""A process that lacks descriptors or memory for a moment says so, and blames no adapter."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.peft_kinds import Gallery
from adapters.stores import refusal
from loraplex_adapters.format.examine import examine
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.load.tensors import load
from loraplex_adapters.store import Store
from loraplex_adapters.store.backup.write import back_up
from loraplex_model.base.refusal import Refusal

from adapters import stores

pytestmark = pytest.mark.fault("shortage-taken-for-damage")


@contextmanager
def lacking(code: int, what: str, blob: Path) -> Iterator[None]:
    """Opening the blob itself (`what` is "") or one of its files fails with an error number."""
    real = os.open
    inode = blob.stat().st_ino

    def fails(path: Any, *args: Any, dir_fd: int | None = None, **options: Any) -> int:
        is_in_blob = dir_fd is not None and os.fstat(dir_fd).st_ino == inode
        if (path == blob) if not what else (path == what and is_in_blob):
            raise OSError(code, os.strerror(code))
        return real(path, *args, dir_fd=dir_fd, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", fails)
        yield


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_descriptor_that_cannot_be_doubled_is_no_missing_folder(
    tmp_path: Path, fails_at: int
) -> None:
    (source,) = stores.adapters(tmp_path, 1)
    calls, real = [], os.dup

    def dup(descriptor: int) -> int:
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(descriptor)

    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "dup", dup)
        with pytest.raises(Refusal, match="no free file descriptors") as caught:
            examine(source, BASE)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("what", ["", CONFIG_FILE, WEIGHTS_FILE])
def test_a_shortage_of_descriptors_is_no_damage(
    gallery: Gallery, tmp_path: Path, what: str, code: int
) -> None:
    (source,) = stores.adapters(tmp_path, 1)
    weights = gallery.weights("llama")
    root = tmp_path / "store"
    with Store(root) as store:
        record, _ = store.register("a", source, BASE)
        blob = store.path(record.digest)
        before = blob.stat().st_ino
        with lacking(code, what, blob):
            assert refusal(store.verify, record.digest)[0] == "STORE_UNAVAILABLE"
            assert refusal(store.register, "b", source, BASE)[0] == "STORE_UNAVAILABLE"
            assert refusal(store.rebase, "a", BASE)[0] == "STORE_UNAVAILABLE"
            assert refusal(load, blob, record.digest, weights)[0] == "STORE_UNAVAILABLE"
            with pytest.raises(Refusal, match="no free file descriptors or memory"):
                examine(blob, BASE)
            assert refusal(list, store.verify_all())[0] == "STORE_UNAVAILABLE"
            assert refusal(back_up, root, "", tmp_path / "backup")[0] == "STORE_UNAVAILABLE"
        assert blob.stat().st_ino == before
        store.verify(record.digest)
        assert store.register("b", source, BASE)[1]
