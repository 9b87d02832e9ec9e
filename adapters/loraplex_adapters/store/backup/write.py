"""Makes a backup, or brings one up to date, while servers use the store.

The index is read in one transaction, and then the files that it names are copied. A collection of
garbage may remove a file in between. Then the index is read again: if it still names the file, the
store has lost it, and the manifest says so; the rest of the store is backed up all the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from loraplex_model.base.durable import flush, flush_file, lock, write_atomically
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.backup import rows
from loraplex_adapters.store.backup.attached.folder import HEX, Attachments, object_in, sizes_of
from loraplex_adapters.store.backup.attached.taking import Taken, take
from loraplex_adapters.store.backup.copying import copy
from loraplex_adapters.store.backup.place import (
    LOCK,
    MANIFEST,
    MARKER,
    WORK,
    Manifest,
    blob_in,
    disk_errors,
    index_name,
    marker,
    read_manifest,
    read_marker,
    require_directory,
)
from loraplex_adapters.store.disk import require_store, unavailable
from loraplex_adapters.store.files.blobs import blob_at, is_complete
from loraplex_adapters.store.files.identity import read_id
from loraplex_adapters.store.index import schema
from loraplex_adapters.store.index.database import Database

_OLD_INDEX: Final = re.compile(r"\Aindex-[0-9a-f]{16}\.jsonl\Z")
_READINGS: Final = 5


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A finished backup.

    Attributes:
        manifest: what it consists of.
        copied: digests whose files were copied; the backup had the others already.
        pruned: digests whose files were removed from the backup.
        attached_copied: number of files of attached folders that were copied.
    """

    manifest: Manifest
    copied: tuple[str, ...]
    pruned: tuple[str, ...]
    attached_copied: int = 0


@dataclass(frozen=True, slots=True)
class _Dumped:
    """A dumped index, in a file of the working directory."""

    file: Path
    sha256: str
    meta: dict[str, str]
    rows: dict[str, int]
    digests: tuple[str, ...]


def back_up(
    root: Path,
    url: str,
    place: Path,
    *,
    prune: bool = False,
    attachments: Attachments | None = None,
) -> BackedUp:
    """Backs up the store in `root`, whose index is at `url` ("" for SQLite), to the directory
    `place`.

    `place` is created, is empty, or holds a backup of the same store, which is brought up to date:
    only files that it lacks are copied. Files that the index no longer names stay, unless `prune`.
    The store is not changed. Unfinished uploads are not backed up.
    The folders of `attachments` are read before the index, so that what they say of adapters is
    never newer than the index. If there is no place for such folders, a backup that has some is
    refused, since they would be lost from it.
    Raises Refusal: STORE_UNAVAILABLE; BACKUP_INVALID (`place` holds a backup of another store, or a
    newer one); BACKUP_FAILED (it holds something else, or cannot be written); DISK_FULL; BUSY.
    """
    require_store(root)
    database = Database(root / "index.sqlite3", url)
    try:
        store_id = _store_id(root, database)
        with _held(place, store_id) as work:
            former = _former(place)
            taken = _take_attached(attachments, place, work, former)
            sizes = dict(former.blobs) if former is not None else {}
            dumped, lost, copied = _copy_all(root, database, place, work, sizes)
            manifest = _manifest(dumped, lost, sizes, taken)
            _commit(place, dumped, manifest)
            pruned = _prune(place, manifest) if prune else ()
            return BackedUp(manifest, copied, pruned, taken.copied)
    finally:
        database.close()


def _store_id(root: Path, database: Database) -> str:
    with database.reading() as connection:
        schema.require_not_newer(schema.version(connection))
        if not schema.is_current(connection):
            raise unavailable(
                "the adapter store's index is of an earlier version: start a server on it, or run "
                "`loraplex-server store ls`, to bring it up to date"
            )
        store_id = rows.meta(connection)["store_id"]
    if read_id(root) != store_id:
        raise unavailable("the adapter store's directory and index do not belong together")
    return store_id


@contextmanager
def _held(place: Path, store_id: str) -> Iterator[Path]:
    """Holds a backup's lock, and makes an empty working directory in it."""
    with disk_errors():
        _prepare(place, store_id)
        try:
            held = lock(place / LOCK, wait=False, mode=0o600)
        except BlockingIOError:
            message = f"another process makes a backup in {place}"
            raise Refusal(Reason.BUSY, message) from None
    try:
        work = place / WORK
        with disk_errors():
            for folder in (work, place / "blobs", place / "blobs" / "sha256"):
                require_directory(folder)
            shutil.rmtree(work, ignore_errors=True)  # of a backup that was interrupted
            for folder in (work, place / "blobs", place / "blobs" / "sha256"):
                folder.mkdir(0o700, exist_ok=True)
            flush(place)
            flush(place / "blobs")
        yield work
    finally:
        shutil.rmtree(place / WORK, ignore_errors=True)
        os.close(held)


def _prepare(place: Path, store_id: str) -> None:
    """Makes the directory, and marks it as a backup of this store. Raises OSError, Refusal."""
    place.mkdir(0o700, parents=True, exist_ok=True)
    known = read_marker(place)
    if known is None:
        others = set(os.listdir(place)) - {"lost+found"}
        # A first backup that was interrupted at its very beginning leaves such a file.
        if any(not name.startswith(".writing-") for name in others):
            message = f"{place} holds other files; name an empty or a new directory"
            raise Refusal(Reason.BACKUP_FAILED, message)
        reach("backup.mark")
        write_atomically(place / MARKER, marker(store_id), mode=0o600)
        flush(place)
    elif known != store_id:
        message = f"{place} holds a backup of another store; name another directory"
        raise Refusal(Reason.BACKUP_INVALID, message)


def _former(place: Path) -> Manifest | None:
    """The manifest of the backup before this one; None if there is none, or a damaged one.

    Files that it does not name are copied again.
    """
    try:
        return read_manifest(place)
    except Refusal as refusal:
        if refusal.reason is not Reason.BACKUP_INVALID:
            raise
        return None


def _take_attached(
    attachments: Attachments | None, place: Path, work: Path, former: Manifest | None
) -> Taken:
    """Copies the attached folders. Raises Refusal as `back_up`."""
    if attachments is None:
        return Taken({}, (), 0)
    if not attachments.exists():
        if former is not None and former.attached:
            count = len(former.attached)
            message = (
                f"{place} has {count} folders of records, and the directory that they came from is "
                "not there; name that directory, or say that they are to be left out"
            )
            raise Refusal(Reason.BACKUP_FAILED, message)
        return Taken({}, (), 0)
    return take(attachments, place, work, sizes_of(former.attached) if former else {})


def _copy_all(
    root: Path, database: Database, place: Path, work: Path, sizes: dict[str, int]
) -> tuple[_Dumped, tuple[str, ...], tuple[str, ...]]:
    """Dumps the index and copies the files that it names and the backup lacks.

    Adds their sizes to `sizes`. Returns the dump, the digests that are lost, and those copied.
    """
    copied: list[str] = []
    before: list[str] | None = None
    for _ in range(_READINGS):
        dumped = _dump(database, work)
        lost = []
        for digest in dumped.digests:
            if _has(place, digest, sizes.get(digest)):
                continue
            size = _copy_one(root, place, work, digest)
            if size is None:
                lost.append(digest)
            else:
                sizes[digest] = size
                copied.append(digest)
        if not lost or lost == before:
            break
        before = lost
    return dumped, tuple(lost), tuple(copied)


def _dump(database: Database, work: Path) -> _Dumped:
    """Writes the index to a file of the working directory, flushed to the disk."""
    file, digest = work / uuid.uuid4().hex, hashlib.sha256()
    counts: dict[str, int] = {}
    with database.reading() as connection:
        with disk_errors(), open(file, "xb", opener=_private) as out:
            for line in rows.dump(connection):
                reach("backup.dump.write")
                out.write(line)
                digest.update(line)
                table = line[2 : line.index(b'"', 2)].decode()
                counts[table] = counts.get(table, 0) + 1
            reach("backup.dump.sync")
            flush_file(out)
        named = sa.select(schema.versions.c.digest).distinct()
        digests = tuple(sorted(connection.execute(named).scalars()))
        return _Dumped(file, digest.hexdigest(), dict(rows.meta(connection)), counts, digests)


def _has(place: Path, digest: str, size: int | None) -> bool:
    """Whether the backup has an adapter's files, with the size that they had when copied."""
    blob = blob_in(place, digest)
    if size is None or not is_complete(blob):
        return False
    return sum(file.lstat().st_size for file in blob.iterdir()) == size


def _copy_one(root: Path, place: Path, work: Path, digest: str) -> int | None:
    """Copies an adapter's files; returns their size, None if the store has lost them."""
    fresh = work / uuid.uuid4().hex
    with disk_errors():
        fresh.mkdir(0o700)
    try:
        size = copy(blob_at(root, digest), digest, fresh, 0o600, disk_errors)
    except Refusal as refusal:
        if refusal.reason is not Reason.BACKUP_INVALID:
            raise
        return None
    with disk_errors():
        blob = blob_in(place, digest)
        if os.path.lexists(blob):  # damaged, or of an interrupted backup
            blob.rename(work / uuid.uuid4().hex)
        reach("backup.copy.place")
        fresh.rename(blob)
        flush(blob.parent)
    return size


def _manifest(
    dumped: _Dumped, lost: Collection[str], sizes: dict[str, int], taken: Taken
) -> Manifest:
    return Manifest(
        store_id=dumped.meta["store_id"],
        schema_version=int(dumped.meta["schema_version"]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index=index_name(dumped.sha256),
        index_sha256=dumped.sha256,
        rows=dumped.rows,
        blobs={digest: sizes[digest] for digest in dumped.digests if digest not in lost},
        lost=tuple(lost),
        attached=taken.folders,
        attached_lost=taken.lost,
    )


def _commit(place: Path, dumped: _Dumped, manifest: Manifest) -> None:
    """Puts the index into its place and names it in the manifest; then the backup is whole."""
    with disk_errors():
        reach("backup.commit.index")
        dumped.file.replace(place / manifest.index)
        flush(place)
        reach("backup.commit.manifest")
        write_atomically(place / MANIFEST, manifest.encode(), mode=0o600)
        flush(place)
        reach("backup.commit.done")
        for name in os.listdir(place):
            if _OLD_INDEX.match(name) and name != manifest.index:
                (place / name).unlink()


def _prune(place: Path, manifest: Manifest) -> tuple[str, ...]:
    """Removes the files of adapters, and of folders, that the manifest does not name."""
    pruned = []
    with disk_errors():
        for name in sorted(os.listdir(place / "blobs" / "sha256")):
            digest = f"sha256:{name}"
            if HEX.match(name) and digest not in manifest.blobs:
                reach("backup.prune")
                blob_in(place, digest).rename(place / WORK / uuid.uuid4().hex)
                pruned.append(digest)
        named, attached = sizes_of(manifest.attached), place / "attached" / "sha256"
        for name in sorted(os.listdir(attached)) if attached.is_dir() else ():
            if HEX.match(name) and name not in named:
                reach("backup.attached.prune")
                object_in(place, name).rename(place / WORK / uuid.uuid4().hex)
    return tuple(pruned)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
