"""The index as lines of JSON, in an order that both databases can read and write.

A line is `["table", {"column": value, ...}]`. Tables follow each other so that no row comes before
one that it refers to, and the rows of a table are in the order of their key. Numbers that only
order rows, and that the database gives itself, are left out. Equal indexes have equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from loraplex_adapters.store.backup.place import invalid
from loraplex_adapters.store.index import schema

Row: TypeAlias = tuple[str, dict[str, Any]]
"""A table's name and the row's values by column."""

_BATCH: Final = 500


def dump(connection: sa.Connection) -> Iterator[bytes]:
    """The lines of the index, each with its line feed, as one transaction sees it."""
    for table in schema.tables.sorted_tables:
        columns = _columns(table)
        query = sa.select(*columns.values()).order_by(*table.primary_key.columns)
        for row in connection.execute(query):
            line = [table.name, dict(zip(columns, row, strict=True))]
            yield json.dumps(line, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def parse(lines: Iterable[bytes]) -> Iterator[Row]:
    """The rows that lines stand for. Raises Refusal(BACKUP_INVALID)."""
    known = {table.name: frozenset(_columns(table)) for table in schema.tables.sorted_tables}
    for number, line in enumerate(lines, 1):
        try:
            table, values = json.loads(line)
            unknown = set(values) - known[table]
        except (ValueError, TypeError, RecursionError):
            raise invalid(f"line {number} of the index is damaged") from None
        except KeyError:
            raise _newer(f"the table {table}") from None
        if unknown:
            raise _newer(f"{table}.{min(unknown)}")
        yield table, values


def load(connection: sa.Connection, rows: Iterable[Row]) -> None:
    """Adds rows to empty tables, in this transaction.

    Raises Refusal(BACKUP_INVALID) for rows that contradict each other.
    """
    for name, group in groupby(rows, key=lambda row: row[0]):
        insert = sa.insert(schema.tables.tables[name])
        values = (values for _, values in group)
        while batch := list(islice(values, _BATCH)):
            try:
                connection.execute(insert, batch)
            except SQLAlchemyError as error:
                raise invalid(f"rows of the table {name} contradict each other") from error


def rehearse(rows: Iterable[Row]) -> None:
    """Loads rows into a database in memory, which is dropped. Raises Refusal(BACKUP_INVALID)."""
    engine = sa.create_engine("sqlite://")
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA foreign_keys = ON")
            schema.tables.create_all(connection)
            load(connection, rows)
    finally:
        engine.dispose()


def meta(connection: sa.Connection) -> Mapping[str, str]:
    """The index's version, the store's id and the number of changes, by their keys."""
    rows = connection.execute(sa.select(schema.meta.c.key, schema.meta.c.value))
    return {str(key): str(value) for key, value in rows}


def _columns(table: sa.Table) -> dict[str, sa.Column[Any]]:
    """The columns by name, without the number that the database gives a row itself."""
    given = table.autoincrement_column
    return {column.name: column for column in table.columns if column is not given}


def _newer(what: str) -> Exception:
    return invalid(
        f"the index has {what}, which this version does not know; use the server that made it"
    )
