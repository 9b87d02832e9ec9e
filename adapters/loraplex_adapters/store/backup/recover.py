"""Makes a new store of a backup: in the store's directory, and in its database.

The directory cannot be opened as a store before everything is in its place: until then a file
lies where every version of the server needs the directory `staging`. Its removal is the last step.
An interrupted recovery goes on when it is started again, with what is there already.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from loraplex_model.base.durable import flush, make_directory, write_atomically
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store import disk
from loraplex_adapters.store.backup import rows
from loraplex_adapters.store.backup.attached import placing
from loraplex_adapters.store.backup.copying import check, copy
from loraplex_adapters.store.backup.place import Manifest, blob_in, invalid, read_file
from loraplex_adapters.store.backup.verify import Checked, check_backup, index_rows
from loraplex_adapters.store.files.blobs import blob_at
from loraplex_adapters.store.files.identity import read_id, write_id
from loraplex_adapters.store.index import schema
from loraplex_adapters.store.index.database import Database

_GUARD: Final = "staging"
_WORK: Final = "recovering"
_TEXT: Final = "This store is being recovered from a backup. To go on, recover it again.\n"
_NOTHING: Final = {"lock", "lost+found"}
_UNFINISHED: Final = ".writing-"


@dataclass(frozen=True, slots=True)
class Recovered:
    """A store that was made of a backup.

    Attributes:
        manifest: the backup's.
        adapters: number of different adapters whose files are there.
        left_out: digests that the index names and whose files are not there.
        folders: number of attached folders that are there.
        folders_left_out: names of those that are not.
    """

    manifest: Manifest
    adapters: int
    left_out: tuple[str, ...]
    folders: int = 0
    folders_left_out: tuple[str, ...] = ()


def recover(
    place: Path,
    root: Path,
    url: str = "",
    *,
    damaged: bool = False,
    attached: Path | None = None,
) -> Recovered:
    """Makes a store in `root`, and in the database `url`, of the backup in `place`.

    The whole backup is read and checked before anything is written. `root` must be missing or
    empty, and the database must have no store. The store has the id that it had.
    Attached folders come into the directory `attached`, which must be missing or empty and which no
    server may use; without it they are left out.
    Adapters whose files were lost when the backup was made have none in the new store either; with
    `damaged`, so do adapters whose files are damaged in the backup, which is otherwise refused, and
    damaged folders are left out.
    Raises Refusal: BACKUP_INVALID, BACKUP_FAILED, STORE_EXISTS, STORE_FULL, STORE_UNAVAILABLE,
    BUSY.
    """
    checked = check_backup(place)
    if not damaged:
        _require_intact(checked)
    database = Database(root / "index.sqlite3", url)
    with disk.disk_errors():
        if os.path.lexists(root) and not root.is_dir():
            raise _exists(f"{root} is not a directory")
    with disk.locked(root):
        try:
            goes_on = _is_unfinished(root)
            if not goes_on:
                _require_new(root, database if url else None)
            folders = checked.manifest.attached
            if attached is None or not folders:
                return _fill(place, checked, root, database, None)
            with placing.held(attached, folders, goes_on=goes_on):
                return _fill(place, checked, root, database, attached)
        finally:
            database.close()


def _require_intact(checked: Checked) -> None:
    for found, what in (
        (checked.damaged, "adapters"),
        (checked.attached_damaged, "folders of records"),
    ):
        if found:
            first = next(iter(found.values()))
            raise invalid(
                f"{len(found)} {what} of the backup are damaged: {first}; to recover everything "
                "else, say so (--damaged)"
            )


def _is_unfinished(root: Path) -> bool:
    """Whether a recovery into this directory was interrupted."""
    with disk.disk_errors():
        try:
            return read_file(root / _GUARD) == _TEXT.encode()
        except (FileNotFoundError, Refusal):  # a refusal: a directory, or a link
            return False


def _require_new(root: Path, database: Database | None) -> None:
    """Raises Refusal(STORE_EXISTS) if the directory, or a database apart from it, is in use."""
    with disk.disk_errors():
        found = sorted(set(os.listdir(root)) - _NOTHING)
        found = [name for name in found if not name.startswith(_UNFINISHED)]
    if found:
        raise _exists(f"{root} is not empty ({', '.join(found[:3])})")
    if database is not None:
        with database.reading() as connection:
            if schema.version(connection) != 0:
                raise _exists("the database has the index of a store")


def _fill(
    place: Path, checked: Checked, root: Path, database: Database, attached: Path | None
) -> Recovered:
    manifest = checked.manifest
    with disk.disk_errors():
        reach("backup.recover.guard")
        write_atomically(root / _GUARD, _TEXT.encode(), mode=0o644)
        flush(root)
        if read_id(root) not in (None, manifest.store_id):
            raise _exists(f"{root} holds parts of another store")
        shutil.rmtree(root / _WORK, ignore_errors=True)
        (root / _WORK).mkdir()
        make_directory(root / "blobs" / "sha256")
    intact = [digest for digest in manifest.blobs if digest not in checked.damaged]
    for digest in intact:
        _place(place, root, digest)
    if attached is not None:
        placing.put(place, manifest.attached, attached, checked.attached_damaged)
    reach("backup.recover.identity")
    write_id(root, manifest.store_id)
    _write_index(place, manifest, database)
    with disk.disk_errors():
        shutil.rmtree(root / _WORK, ignore_errors=True)
        flush(root)
        reach("backup.recover.done")
        (root / _GUARD).unlink()
        flush(root)
    there = set(manifest.attached) - set(checked.attached_damaged)
    if attached is None:
        there = set()
    absent = {*manifest.attached, *manifest.attached_lost} - there
    lost = _left_out(manifest, checked.damaged)
    return Recovered(manifest, len(intact), lost, len(there), tuple(sorted(absent)))


def _place(place: Path, root: Path, digest: str) -> None:
    """Copies an adapter's files into the store, unless an interrupted recovery has done so."""
    target = blob_at(root, digest)
    if os.path.lexists(target):
        try:
            check(target, digest)
            return
        except Refusal:
            with disk.disk_errors():
                target.rename(root / _WORK / uuid.uuid4().hex)
    fresh = root / _WORK / uuid.uuid4().hex
    with disk.disk_errors():
        fresh.mkdir()
    copy(blob_in(place, digest), digest, fresh, 0o444, disk.disk_errors)
    with disk.disk_errors():
        reach("backup.recover.place")
        fresh.rename(target)
        flush(target.parent)


def _write_index(place: Path, manifest: Manifest, database: Database) -> None:
    """Writes the index in one transaction, unless an interrupted recovery has done so."""
    with database.writing() as connection:
        reach("backup.recover.index")
        if schema.version(connection) == 0:
            schema.create(connection)
            rows.load(connection, index_rows(place, manifest))
        elif not _is_same(connection, place, manifest):
            raise _exists("the database has the index of a store")


def _is_same(connection: sa.Connection, place: Path, manifest: Manifest) -> bool:
    """Whether the index in the database is that of the backup."""
    if not schema.is_current(connection):
        return False
    return list(rows.parse(rows.dump(connection))) == list(index_rows(place, manifest))


def _left_out(manifest: Manifest, damaged: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted({*manifest.lost, *damaged}))


def _exists(message: str) -> Refusal:
    text = f"{message}; a backup is recovered only into a new, empty store"
    return Refusal(Reason.STORE_EXISTS, text)
