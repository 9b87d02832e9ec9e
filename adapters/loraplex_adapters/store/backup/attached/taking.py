"""Copies folders into a backup, while the server that owns them goes on."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_model.base.durable import flush, flush_file
from loraplex_model.base.faults import reach

from loraplex_adapters.store.backup.attached.folder import (
    HEX,
    AttachedFile,
    AttachedFolder,
    Attachments,
    Listed,
    has_object,
    is_folder_name,
    object_in,
    open_regular,
)
from loraplex_adapters.store.backup.place import disk_errors, require_directory

_PIECE: Final = 1 << 20

log = logging.getLogger(__name__)


class _Damaged(Exception):
    """Bytes that cannot be read, or are not those that were expected."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a backup took along.

    Attributes:
        folders: what it has of each folder.
        lost: names of folders that are damaged, and that the backup does not have.
        copied: number of contents that were copied; the backup had the others already.
    """

    folders: Listed
    lost: tuple[str, ...]
    copied: int


def take(attachments: Attachments, place: Path, work: Path, known: Mapping[str, int]) -> Taken:
    """Copies every folder's files that the backup lacks.

    `known` has the sizes of the contents that the backup's manifest names, by their SHA-256. A
    folder that is deleted meanwhile is left out. Raises Refusal: BACKUP_INVALID, BACKUP_FAILED,
    DISK_FULL.
    """
    with disk_errors():
        for parent in (place / "attached", place / "attached" / "sha256"):
            require_directory(parent)
            parent.mkdir(0o700, exist_ok=True)
        flush(place / "attached")
        flush(place)
    sizes = dict(known)
    folders: dict[str, Mapping[str, tuple[str, int]]] = {}
    lost, copied = [], 0
    for folder in _each(attachments):
        assert is_folder_name(folder.name), folder.name
        before = len(sizes)
        try:
            folders[folder.name] = dict(_files(folder, place, work, sizes))
        except FileNotFoundError:  # deleted, which takes the whole folder away at once
            if _is_there(folder):
                lost.append(folder.name)
        except _Damaged:
            lost.append(folder.name)
        copied += len(sizes) - before
    return Taken(folders, tuple(lost), copied)


def _each(attachments: Attachments) -> Iterator[AttachedFolder]:
    """The folders one after the other, since their records may be large. Raises Refusal."""
    found = iter(attachments.folders())
    while True:
        with disk_errors():
            folder = next(found, None)
        if folder is None:
            return
        yield folder


def _files(
    folder: AttachedFolder, place: Path, work: Path, sizes: dict[str, int]
) -> Iterator[tuple[str, tuple[str, int]]]:
    if folder.files is None:
        raise _Damaged
    for name, file in folder.files.items():
        yield name, _take_one(file, place, work, sizes)


def _is_there(folder: AttachedFolder) -> bool:
    sources = [file.source for file in (folder.files or {}).values()]
    return any(isinstance(source, Path) and source.parent.is_dir() for source in sources)


def _take_one(
    file: AttachedFile, place: Path, work: Path, sizes: dict[str, int]
) -> tuple[str, int]:
    """SHA-256 and size of a file whose content the backup has on return.

    Raises FileNotFoundError, _Damaged, Refusal.
    """
    expected = file.sha256
    if isinstance(file.source, bytes):
        expected = hashlib.sha256(file.source).hexdigest()
    if not HEX.match(expected):
        raise _Damaged
    with disk_errors():
        if has_object(place, expected, sizes.get(expected)):
            return expected, sizes[expected]
    fresh, digest, size = work / uuid.uuid4().hex, hashlib.sha256(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with ExitStack() as opened:
        with disk_errors():
            made = os.open(fresh, flags, 0o600)
            out = opened.enter_context(open(made, "wb", buffering=0))
        for piece in _pieces(file.source):
            digest.update(piece)
            size += len(piece)
            with disk_errors():
                reach("backup.attached.write")
                view = memoryview(piece)
                while view:
                    view = view[out.write(view) :]
        if digest.hexdigest() != expected:
            raise _Damaged
        with disk_errors():
            reach("backup.attached.sync")
            flush_file(out)
    _put(fresh, object_in(place, expected), work)
    sizes[expected] = size
    return expected, size


def _put(fresh: Path, target: Path, work: Path) -> None:
    with disk_errors():
        if target.is_dir() and not target.is_symlink():  # damaged; a file is replaced
            target.rename(work / uuid.uuid4().hex)
        reach("backup.attached.place")
        fresh.replace(target)
        flush(target.parent)


def _pieces(source: bytes | Path) -> Iterator[bytes]:
    """The bytes of a source. Raises FileNotFoundError, _Damaged."""
    if isinstance(source, bytes):
        yield source
        return
    try:
        with open(open_regular(source), "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                yield piece
    except FileNotFoundError:
        raise
    except OSError as error:
        log.error("%s cannot be backed up: %s", source, error.strerror or error)
        raise _Damaged from error
