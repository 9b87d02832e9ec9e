"""Puts the folders of a backup into a new root, each complete before it gets its name."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from loraplex_model.base.durable import flush, flush_file, lock, make_directory
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store import disk
from loraplex_adapters.store.backup.attached.folder import Listed, object_in, open_regular
from loraplex_adapters.store.backup.place import invalid

_WORK: Final = ".recovering"
_LOCK: Final = "lock"
_IGNORED: Final = {_WORK, _LOCK, "lost+found"}
_PIECE: Final = 1 << 20


def check_object(place: Path, sha256: str, size: int) -> None:
    """Reads a content of a backup. Raises Refusal(BACKUP_INVALID) if it is damaged."""
    for _ in _pieces(place, sha256, size):
        pass


@contextmanager
def held(root: Path, listed: Listed, *, goes_on: bool) -> Iterator[None]:
    """Holds the lock of the folders' root, which is made if it is missing and must be empty.

    With `goes_on`, folders that `listed` names may be there, from a recovery that was interrupted.
    Raises Refusal: STORE_EXISTS, BUSY, STORE_FULL, STORE_UNAVAILABLE.
    """
    with disk.disk_errors():
        if os.path.lexists(root) and not root.is_dir():
            raise _exists(f"{root} is not a directory")
        make_directory(root, 0o700)
        try:
            descriptor = lock(root / _LOCK, wait=False, mode=0o600)
        except BlockingIOError:
            raise Refusal(Reason.BUSY, f"a server uses {root}") from None
    try:
        with disk.disk_errors():
            unknown = sorted(set(_there(root, listed)) - set(listed if goes_on else ()))
        if unknown:
            raise _exists(f"{root} is not empty ({', '.join(unknown[:3])})")
        yield
    finally:
        os.close(descriptor)


def put(place: Path, listed: Listed, root: Path, left_out: Collection[str]) -> None:
    """Puts the folders of a backup into `root`, but for those `left_out`.

    Raises Refusal: BACKUP_INVALID, STORE_EXISTS (another folder has the name), STORE_FULL,
    STORE_UNAVAILABLE.
    """
    work = root / _WORK
    with disk.disk_errors():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(0o700)
    for name, files in listed.items():
        if name not in left_out:
            _put_one(place, files, root / name, work)
    with disk.disk_errors():
        shutil.rmtree(work, ignore_errors=True)
        flush(root)


def _put_one(place: Path, files: Mapping[str, tuple[str, int]], target: Path, work: Path) -> None:
    with disk.disk_errors():
        if os.path.lexists(target):  # of a recovery that was interrupted
            if not _is_same(target, files):
                raise _exists(f"{target} is there already, with other content")
            return
        fresh = work / uuid.uuid4().hex
        fresh.mkdir(0o700)
    for name, (sha256, size) in files.items():
        _copy(place, sha256, size, fresh / name)
    with disk.disk_errors():
        flush(fresh)
        make_directory(target.parent, 0o700)
        reach("backup.recover.attached.place")
        fresh.rename(target)
        flush(target.parent)


def _copy(place: Path, sha256: str, size: int, target: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as opened:
        with disk.disk_errors():
            made = os.open(target, flags, 0o600)
            out = opened.enter_context(open(made, "wb", buffering=0))
        for piece in _pieces(place, sha256, size):
            with disk.disk_errors():
                reach("backup.recover.attached.write")
                view = memoryview(piece)
                while view:
                    view = view[out.write(view) :]
        with disk.disk_errors():
            reach("backup.recover.attached.sync")
            flush_file(out)


def _pieces(place: Path, sha256: str, size: int) -> Iterator[bytes]:
    """The bytes of a content of a backup. Raises Refusal(BACKUP_INVALID)."""
    digest, count = hashlib.sha256(), 0
    try:
        with open(open_regular(object_in(place, sha256)), "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                count += len(piece)
                yield piece
    except OSError as error:
        raise invalid(f"the content {sha256[:16]} is missing or unreadable") from error
    if (digest.hexdigest(), count) != (sha256, size):
        raise invalid(f"the content {sha256[:16]} has changed")


def _is_same(folder: Path, files: Mapping[str, tuple[str, int]]) -> bool:
    """Whether a folder has these files and no others. Raises OSError."""
    if not folder.is_dir() or set(os.listdir(folder)) != set(files):
        return False
    for name, (sha256, size) in files.items():
        with open(open_regular(folder / name), "rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return False
    return True


def _there(root: Path, listed: Listed) -> Iterator[str]:
    """Names of what is in a root, as deep as those of `listed`; not of empty directories."""
    parents = {name.partition("/")[0] for name in listed if "/" in name}
    for entry in root.iterdir():
        inside = sorted(os.listdir(entry)) if entry.is_dir() and not entry.is_symlink() else None
        if entry.name in _IGNORED or inside == []:
            continue
        if entry.name in parents and inside is not None:
            yield from (f"{entry.name}/{name}" for name in inside)
        else:
            yield entry.name


def _exists(message: str) -> Refusal:
    text = f"{message}; records are recovered only into a new, empty directory"
    return Refusal(Reason.STORE_EXISTS, text)
