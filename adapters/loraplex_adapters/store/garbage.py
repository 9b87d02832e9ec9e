"""Garbage collection: removes versions deleted long ago, and blobs that no version names.

A registration keeps its own copy until a name points to the content, and puts the copy into its
place inside the change of the index that adds the name, unless the blob is there. A collection
moves a blob to the trash inside a change that has found no version with its digest. Changes run one
after the other, so that neither can undo the other, and a registration never has to try again. If a
crash undoes a change after its blob was moved, and a registration follows before the next
collection, then a blob in the trash is named again; the next collection moves it back.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from loraplex_model.base.faults import reach

from loraplex_adapters.store.files.blobs import Blobs
from loraplex_adapters.store.files.uploads import Uploads
from loraplex_adapters.store.index import lookup, schema, texts
from loraplex_adapters.store.index.database import Database

_versions, _blobs, _aliases = schema.versions.c, schema.blobs.c, schema.aliases.c


@dataclass(frozen=True, slots=True)
class Collected:
    """The result of a collection: what it removed or, in a dry run, would remove.

    Attributes:
        versions: deleted versions, as "name@version".
        aliases: aliases that pointed to these versions.
        digests: digests of the removed blobs.
        bytes: size of the removed blobs on disk.
        uploads: ids of the expired uploads.
    """

    versions: tuple[str, ...]
    aliases: tuple[str, ...]
    digests: tuple[str, ...]
    bytes: int
    uploads: tuple[str, ...]


def collect(
    database: Database,
    blobs: Blobs,
    uploads: Uploads,
    grace_seconds: float,
    keep: Collection[str],
    dry_run: bool,
) -> Collected:
    """Does what `Store.gc` describes. A crash at any point only leaves more to collect."""
    now = time.time()
    if not dry_run:
        empty_trash(database, blobs)
        uploads.clear()
    versions, aliases = _drop_versions(database, now - grace_seconds, dry_run)
    kept = frozenset(keep)
    digests, freed = [], 0
    for digest in _unnamed(database, blobs, versions, now, grace_seconds):
        if digest in kept:
            continue
        size = blobs.size(digest)
        if dry_run or _drop_blob(database, blobs, digest):
            digests.append(digest)
            freed += size
    return Collected(
        tuple(f"{name}@{version}" for name, version in versions),
        aliases,
        tuple(digests),
        freed,
        uploads.expire(dry_run),
    )


def empty_trash(database: Database, blobs: Blobs) -> None:
    """Moves blobs that a version names back from the trash, and removes the others."""
    for digest, discarded in blobs.discarded():
        with database.writing() as connection:
            if _is_named(connection, digest) and not blobs.has(digest):
                blobs.take_back(digest, discarded)
        blobs.remove(discarded)


def _drop_versions(
    database: Database, before: float, dry_run: bool
) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    expired = sa.and_(_versions.deleted_at.is_not(None), _versions.deleted_at <= before)
    found = sa.select(_versions.name, _versions.version).where(expired)
    pointing = sa.select(_aliases.alias).join(schema.versions, lookup.is_target).where(expired)
    with database.reading() if dry_run else database.writing() as connection:
        versions = [(name, version) for name, version in connection.execute(found)]
        aliases = tuple(connection.execute(pointing.order_by(_aliases.alias)).scalars())
        if not dry_run:
            reach("store.collect.drop")
            for table in (schema.aliases, schema.labels, schema.versions):
                for name, version in versions:
                    connection.execute(
                        sa.delete(table).where(table.c.name == name, table.c.version == version)
                    )
            texts.drop(connection, versions)
    return sorted(versions), aliases


def _unnamed(
    database: Database,
    blobs: Blobs,
    dropped: list[tuple[str, int]],
    now: float,
    grace_seconds: float,
) -> list[str]:
    """Digests of blobs, or of their rows, that are old enough and named by dropped versions only.

    Blobs that are named by no version at all are included.
    """
    gone = set(dropped)
    with database.reading() as connection:
        rows = set(connection.execute(sa.select(_blobs.digest)).scalars())
        named = {
            digest
            for digest, name, version in connection.execute(
                sa.select(_versions.digest, _versions.name, _versions.version)
            )
            if (name, version) not in gone
        }
    ages = blobs.ages(now)
    candidates = (rows | ages.keys()) - named
    return sorted(d for d in candidates if ages.get(d, grace_seconds) >= grace_seconds)


def _drop_blob(database: Database, blobs: Blobs, digest: str) -> bool:
    with database.writing() as connection:
        if _is_named(connection, digest):
            return False
        connection.execute(sa.delete(schema.blobs).where(_blobs.digest == digest))
        discarded = blobs.discard(digest)
    if discarded is not None:
        blobs.remove(discarded)
    return True


def _is_named(connection: sa.Connection, digest: str) -> bool:
    query = sa.select(_versions.name).where(_versions.digest == digest).limit(1)
    return connection.execute(query).first() is not None
