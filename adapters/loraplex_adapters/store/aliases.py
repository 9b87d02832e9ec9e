"""Aliases: second names of versions, which operators move from one version to another."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store import lookup, records, schema
from loraplex_adapters.store.database import Database
from loraplex_adapters.store.ids import AdapterId
from loraplex_adapters.store.records import Alias

_names, _versions, _aliases = schema.names.c, schema.versions.c, schema.aliases.c


class Aliases:
    """The aliases of the index. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(self, alias: str, adapter: AdapterId, expected: AdapterId | str | None) -> Alias:
        """Points an alias to the version that an id means now, as `Store.set_alias` describes.

        Raises Refusal: ADAPTER_NOT_FOUND, ADAPTER_CONFLICT.
        """
        with self._database.writing() as connection:
            target = lookup.find(connection, adapter)
            if lookup.is_name(connection, alias):
                raise Refusal(Reason.ADAPTER_CONFLICT, f"{alias} is the name of an adapter", alias)
            row = lookup.alias_row(connection, alias)
            if expected is not None:
                _expect(connection, alias, row, expected or None)
            now = time.time()
            values = {"name": target.name, "version": target.version, "updated_at": now}
            if row is None:
                connection.execute(sa.insert(schema.aliases).values(alias=alias, **values))
            elif (row.name, row.version) != (target.name, target.version):
                connection.execute(
                    sa.update(schema.aliases).where(_aliases.alias == alias).values(values)
                )
            else:
                return Alias(
                    alias, row.name, row.version, row.digest, records.moment(row.updated_at)
                )
            schema.count_change(connection)
            return Alias(alias, target.name, target.version, target.digest, records.moment(now))

    def delete(self, alias: str) -> None:
        """Deletes an alias. Raises Refusal(ADAPTER_NOT_FOUND)."""
        with self._database.writing() as connection:
            gone = connection.execute(sa.delete(schema.aliases).where(_aliases.alias == alias))
            if not gone.rowcount:
                raise Refusal(Reason.ADAPTER_NOT_FOUND, f"there is no alias {alias}", alias)
            schema.count_change(connection)

    def all(self) -> tuple[Alias, ...]:
        """All aliases in order, including those of deleted versions."""
        query = (
            sa.select(schema.aliases, _versions.digest)
            .join(schema.versions, lookup.is_target)
            .order_by(_aliases.alias)
        )
        with self._database.reading() as connection:
            return tuple(
                Alias(r.alias, r.name, r.version, r.digest, records.moment(r.updated_at))
                for r in connection.execute(query)
            )


def _expect(
    connection: sa.Connection, alias: str, row: Any, expected: AdapterId | str | None
) -> None:
    shown = "nothing" if row is None else f"{row.name}@{row.version}"
    if isinstance(expected, AdapterId):
        version = expected.version
        if version is None and expected.digest is None:
            version = connection.execute(
                sa.select(_names.current_version).where(_names.name == expected.name)
            ).scalar()
        if (
            row is not None
            and row.name == expected.name
            and (
                row.version == version if expected.digest is None else row.digest == expected.digest
            )
        ):
            return
    elif row is None:
        return
    raise Refusal(
        Reason.ADAPTER_CONFLICT, f"{alias} points to {shown}, not to the expected version", alias
    )
