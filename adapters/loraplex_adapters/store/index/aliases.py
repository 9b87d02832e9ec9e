"""Aliases: second names of versions, which operators move from one version to another."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.index import lookup, records, schema
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.ids import AdapterId
from loraplex_adapters.store.index.records import Alias
from loraplex_adapters.store.index.selector import EVERYTHING, LabelSelector

_names, _aliases = schema.names.c, schema.aliases.c


class Aliases:
    """The aliases of the index. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(
        self,
        alias: str,
        adapter: AdapterId,
        expected: AdapterId | str | None,
        seen: LabelSelector = EVERYTHING,
    ) -> Alias:
        """Points an alias to the version that an id means now, as `Store.set_alias` describes.

        Raises Refusal: ADAPTER_NOT_FOUND, PERMISSION_DENIED, ADAPTER_CONFLICT.
        """
        with self._database.writing() as connection:
            target = lookup.find(connection, adapter, seen)
            lookup.require_seen(connection, alias, seen)
            if lookup.is_name(connection, alias):
                raise Refusal(Reason.ADAPTER_CONFLICT, f"{alias} is the name of an adapter", alias)
            row = lookup.alias_row(connection, alias)
            if expected is not None:
                _expect(connection, alias, row, expected)
            place = {"name": target.name, "version": target.version}
            if row is None:
                change: sa.Insert | sa.Update = sa.insert(schema.aliases).values(alias=alias)
            elif (row.name, row.version) != (target.name, target.version):
                change = sa.update(schema.aliases).where(_aliases.alias == alias)
            else:
                return _alias(row)
            connection.execute(change.values(**place, updated_at=time.time()))
            schema.count_change(connection)
            return _alias(lookup.alias_row(connection, alias))

    def delete(self, alias: str, seen: LabelSelector = EVERYTHING) -> None:
        """Deletes an alias of a version in `seen`. Raises Refusal(ADAPTER_NOT_FOUND)."""
        with self._database.writing() as connection:
            if lookup.alias_row(connection, alias, seen) is None:
                raise Refusal(Reason.ADAPTER_NOT_FOUND, f"there is no alias {alias}", alias)
            connection.execute(sa.delete(schema.aliases).where(_aliases.alias == alias))
            schema.count_change(connection)

    def all(self) -> tuple[Alias, ...]:
        """All aliases in order, including those of deleted versions."""
        with self._database.reading() as connection:
            rows = connection.execute(lookup.aliases.order_by(_aliases.alias))
            return tuple(_alias(row) for row in rows)


def _alias(row: Any) -> Alias:
    return Alias(row.alias, row.name, row.version, row.digest, records.moment(row.updated_at))


def _expect(connection: sa.Connection, alias: str, row: Any, expected: AdapterId | str) -> None:
    """Refuses an alias that does not point to an id; "" stands for one that does not exist."""
    if isinstance(expected, str):
        met = row is None
    elif row is None or row.name != expected.name:
        met = False
    elif expected.digest is not None:
        met = row.digest == expected.digest
    else:
        current = sa.select(_names.current_version).where(_names.name == expected.name)
        met = row.version == (expected.version or connection.execute(current).scalar())
    if not met:
        shown = "nothing" if row is None else f"{row.name}@{row.version}"
        message = f"{alias} points to {shown}, not to the expected version"
        raise Refusal(Reason.ADAPTER_CONFLICT, message, alias)
