"""The connection to the index: SQLite inside the store, or PostgreSQL for several servers.

Changes run one after the other on both: SQLite has one writer, and on PostgreSQL every change first
takes an advisory lock. So a change can rely on what it sees in the store's directory.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from loraplex_model.base.faults import reach
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from loraplex_adapters.store.disk import full, unavailable
from loraplex_adapters.store.index import postgresql

_BUSY_SECONDS = 30
_SLACK_SECONDS = 10
"""Seconds that a statement may take beyond the wait for other changes."""
_LOCK = int.from_bytes(b"loraplex", "big")
_DISK_FULL = "53100"  # PostgreSQL's code


class Database:
    """Transactions on the index. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, file: Path, url: str) -> None:
        """Prepares a connection to `url`, an SQLAlchemy URL, or to SQLite in `file` if it is "".

        The connection is opened at first use.
        """
        self._engine = _postgresql(url) if url else _sqlite(file)
        self._is_sqlite = self._engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A read-only transaction, which sees one state of the database throughout."""
        with _database_errors(), self._engine.connect() as connection:
            if not self._is_sqlite:  # SQLite is always so isolated
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that excludes all other changes; durable when its block ends."""
        with _database_errors(), self._engine.connect() as connection:
            if self._is_sqlite:
                connection = connection.execution_options(loraplex_writes=True)
            else:
                # Before a change others may have to end theirs.
                postgresql.allow(connection, _BUSY_SECONDS + 2 * _SLACK_SECONDS)
                connection = connection.execution_options(isolation_level="READ COMMITTED")
            with connection.begin():
                if not self._is_sqlite:
                    connection.execute(sa.text(f"SET LOCAL lock_timeout = '{_BUSY_SECONDS}s'"))
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                reach("store.index.begun")
                yield connection
                reach("store.index.commit")
            reach("store.index.committed")

    def close(self) -> None:
        """Closes every connection. Idempotent."""
        self._engine.dispose()


def _sqlite(file: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(file)),
        connect_args={"timeout": float(_BUSY_SECONDS)},
        json_deserializer=_read_json,
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _postgresql(text: str) -> sa.Engine:
    try:
        url = sa.make_url(text)
        if url.get_backend_name() != "postgresql":
            raise unavailable("store_url must be empty or begin with postgresql://")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        return postgresql.engine(url, _BUSY_SECONDS + _SLACK_SECONDS)
    except (ArgumentError, ValueError):
        # The URL is not shown, because it may contain a password.
        raise unavailable("store_url is not a database URL") from None
    except ModuleNotFoundError:
        raise unavailable(
            "a PostgreSQL store needs a driver: pip install 'loraplex[server,postgres]'"
        ) from None


def _read_json(text: str) -> Any:
    """Reads a cell. A damaged one is None, so that it does not keep other rows from being read."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _configure(connection: Any, _entry: object) -> None:
    connection.isolation_level = None  # sqlite3 must not begin transactions of its own
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads before it writes must lock at its beginning, or two could deadlock.
    writes = connection.get_execution_options().get("loraplex_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        if getattr(cause, "sqlstate", "") == _DISK_FULL or "full" in str(cause):
            raise full() from cause
        raise unavailable("the adapter store's index cannot be used") from cause
