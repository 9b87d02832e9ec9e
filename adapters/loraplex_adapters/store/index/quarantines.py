"""Quarantine: content that no server loads until an operator releases it."""

from __future__ import annotations

import time

import sqlalchemy as sa

from loraplex_adapters.store.index import records, schema
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.records import Quarantine

_columns = schema.quarantine.c

_MAX_REASON = 1000


class Quarantines:
    """The quarantined digests of the index. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, digest: str, reason: str) -> bool:
        """Quarantines content; False, and nothing changes, if it is quarantined already."""
        known = sa.select(_columns.digest).where(_columns.digest == digest)
        row = {"digest": digest, "reason": reason[:_MAX_REASON], "created_at": time.time()}
        with self._database.writing() as connection:
            if connection.execute(known).first() is not None:
                return False
            connection.execute(sa.insert(schema.quarantine).values(row))
            schema.count_change(connection)
            return True

    def remove(self, digest: str) -> bool:
        """Ends the quarantine of content; False if it was not quarantined."""
        with self._database.writing() as connection:
            gone = connection.execute(sa.delete(schema.quarantine).where(_columns.digest == digest))
            if not gone.rowcount:
                return False
            schema.count_change(connection)
            return True

    def all(self) -> dict[str, Quarantine]:
        """The quarantines by digest, the oldest first."""
        query = sa.select(schema.quarantine).order_by(_columns.created_at, _columns.digest)
        with self._database.reading() as connection:
            return {
                row.digest: Quarantine(row.digest, row.reason, records.moment(row.created_at))
                for row in connection.execute(query)
            }
