"""Versions that were recorded for another base than before, and the permanent record of that."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from loraplex_model.base.info import BaseInfo

from loraplex_adapters.store.index import lookup, records, schema
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.ids import AdapterId
from loraplex_adapters.store.index.records import Record

_versions = schema.versions.c

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rebase:
    """One version's move to another base; `moved_at` is in UTC.

    The fingerprint and the name of the old base are "" if they were not recorded.
    """

    name: str
    version: int
    digest: str
    old_fingerprint: str
    old_base: str
    new_fingerprint: str
    new_base: str
    moved_at: datetime


class Rebases:
    """The versions' bases. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def move(self, record: Record, base: BaseInfo) -> Record:
        """Records that a version was checked against `base`; returns the version.

        Raises Refusal(ADAPTER_NOT_FOUND) if the version has been deleted.
        """
        with self._database.writing() as connection:
            found = lookup.find(connection, AdapterId(record.name, record.version))
            if move(connection, found, base):
                schema.count_change(connection)
            return lookup.find(connection, AdapterId(record.name, record.version))

    def all(self) -> tuple[Rebase, ...]:
        """Every move so far, the oldest first, including those of deleted versions."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(schema.rebases).order_by(schema.rebases.c.id))
            return tuple(
                Rebase(
                    row.name,
                    row.version,
                    row.digest,
                    row.old_fingerprint,
                    row.old_base,
                    row.new_fingerprint,
                    row.new_base,
                    records.moment(row.created_at),
                )
                for row in rows
            )


def move(connection: sa.Connection, version: Any, base: BaseInfo) -> bool:
    """Records a version, a record or a row of one, for `base`; False if it was so already.

    The caller counts the change.
    """
    if version.base_fingerprint == base.fingerprint:
        return False
    connection.execute(
        sa.update(schema.versions)
        .where(_versions.name == version.name, _versions.version == version.version)
        .values(base_fingerprint=base.fingerprint, base_name=base.name)
    )
    row = {
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "old_fingerprint": version.base_fingerprint,
        "old_base": version.base_name,
        "new_fingerprint": base.fingerprint,
        "new_base": base.name,
        "created_at": time.time(),
    }
    connection.execute(sa.insert(schema.rebases).values(row))
    log.info(
        "%s@%s is recorded for the base %s %s, before for %s %s",
        version.name,
        version.version,
        base.name,
        base.fingerprint,
        version.base_name,
        version.base_fingerprint or "(unknown)",
    )
    return True
