"""Collection: what was deleted a while ago goes for good, and so do bytes that nothing names.

A registration that finds its bytes stored points a name to them a moment later; they must not be
collected in between. So bytes are renamed away inside a change of the index, after a look at what
names them, and a registration looks inside a change of the index whether its bytes are still there.
Changes come one after the other. Should a change be lost after its rename, and a registration come
before the next collection, then bytes in the trash have a name, and are taken back.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from loraplex_model.base.faults import reach

from loraplex_adapters.store import lookup, schema
from loraplex_adapters.store.blobs import Blobs
from loraplex_adapters.store.database import Database
from loraplex_adapters.store.uploads import Uploads

_versions, _blobs, _aliases = schema.versions.c, schema.blobs.c, schema.aliases.c
_labels = schema.labels.c


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would.

    Attributes:
        versions: deleted versions, "name@version".
        aliases: those that pointed to them.
        digests: whose bytes went.
        bytes: of those files, on the disk.
        uploads: ids of uploads that had expired.
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
    """Removes what `Store.gc` says. A crash at any point leaves only more to collect."""
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
    """Takes back what a lost change left in the trash, and removes the rest."""
    for digest, thrown in blobs.discarded():
        with database.writing() as connection:
            if _is_named(connection, digest) and not blobs.has(digest):
                blobs.take_back(digest, thrown)
        blobs.remove(thrown)


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
    return sorted(versions), aliases


def _unnamed(
    database: Database,
    blobs: Blobs,
    dropped: list[tuple[str, int]],
    now: float,
    grace_seconds: float,
) -> list[str]:
    """Digests of blobs or of their rows that no version but dropped ones names, old enough."""
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
        thrown = blobs.discard(digest)
    if thrown is not None:
        blobs.remove(thrown)
    return True


def _is_named(connection: sa.Connection, digest: str) -> bool:
    query = sa.select(_versions.name).where(_versions.digest == digest).limit(1)
    return connection.execute(query).first() is not None
