"""Which name and version points to which digest: a small SQLite database.

Content is immutable, names move. A version is a row that never changes; a name's row holds the
version it points to and the last number it ever used, which outlives the name's deletion, so that
"name@3" never comes to mean something else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from loraplex_adapters.errors import AdapterError
from loraplex_adapters.spec import AdapterSpec
from loraplex_adapters.store.ids import AdapterId

SCHEMA_VERSION = 1
_BUSY_SECONDS = 30.0

_tables = sa.MetaData()
_blobs = sa.Table(
    "blobs",
    _tables,
    sa.Column("digest", sa.String, primary_key=True),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
_names = sa.Table(
    "names",
    _tables,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("current_version", sa.Integer),  # null: the name was deleted
    sa.Column("last_version", sa.Integer, nullable=False),
)
_versions = sa.Table(
    "versions",
    _tables,
    sa.Column("name", sa.ForeignKey("names.name"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.ForeignKey("blobs.digest"), nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
)
_records = (
    sa.select(
        _versions.c.name,
        _versions.c.version,
        _versions.c.digest,
        _versions.c.created_at,
        _blobs.c.summary,
    )
    .join(_blobs, _blobs.c.digest == _versions.c.digest)
    .join(_names, _names.c.name == _versions.c.name)
)
_is_current = _versions.c.version == _names.c.current_version


@dataclass(frozen=True, slots=True)
class Record:
    """One version of a registered adapter. `created_at` is in UTC; the rest is of `AdapterSpec`."""

    name: str
    version: int
    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    base_model: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing; `next_page_token` is "" on the last one."""

    records: tuple[Record, ...]
    next_page_token: str


class Index:
    """The database. Safe to use from several threads and processes; a change is one transaction.

    Every method raises AdapterError(STORE_UNAVAILABLE or STORE_FULL) when the database fails.
    """

    def __init__(self, file: Path) -> None:
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(file)), connect_args={"timeout": _BUSY_SECONDS}
        )
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        with self._writing() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version not in (0, SCHEMA_VERSION):
                raise AdapterError(
                    "STORE_UNAVAILABLE",
                    "the adapter store was made by another version of the server",
                )
            if version == 0:
                _tables.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def point(self, name: str, spec: AdapterSpec, replace: bool) -> tuple[Record, bool]:
        """Points `name` to the content of `spec`; the flag says whether that is a new version.

        Raises AdapterError(ADAPTER_CONFLICT) if it points elsewhere and `replace` is not set.
        """
        with self._writing() as connection:
            last = connection.execute(
                sa.select(_names.c.last_version).where(_names.c.name == name)
            ).scalar()
            current = connection.execute(
                _records.where(_names.c.name == name, _is_current)
            ).one_or_none()
            if current is not None and current.digest == spec.digest:
                return _record(current), False
            if current is not None and not replace:
                raise AdapterError(
                    "ADAPTER_CONFLICT",
                    f"{name} already names other bytes ({current.digest}); replace it or take "
                    "another name",
                    name,
                )
            version, now = (last or 0) + 1, time.time()
            _remember(connection, spec, now)
            row = {"current_version": version, "last_version": version}
            if last is None:
                connection.execute(sa.insert(_names).values(name=name, **row))
            else:
                connection.execute(sa.update(_names).where(_names.c.name == name).values(row))
            connection.execute(
                sa.insert(_versions).values(
                    name=name, version=version, digest=spec.digest, created_at=now
                )
            )
            made = connection.execute(_records.where(_names.c.name == name, _is_current)).one()
            return _record(made), True

    def find(self, adapter: AdapterId) -> Record:
        """The version that an id means; of several with one digest the newest.

        Raises AdapterError(ADAPTER_NOT_FOUND).
        """
        query = _records.where(_names.c.name == adapter.name)
        if adapter.digest is not None:
            query = query.where(_versions.c.digest == adapter.digest)
        elif adapter.version is not None:
            query = query.where(_versions.c.version == adapter.version)
        else:
            query = query.where(_is_current)
        with self._reading() as connection:
            row = connection.execute(query.order_by(_versions.c.version.desc()).limit(1)).first()
        if row is None:
            which = adapter.digest or adapter.version
            shown = adapter.name if which is None else f"{adapter.name}@{which}"
            raise AdapterError("ADAPTER_NOT_FOUND", f"there is no adapter {shown}", shown)
        return _record(row)

    def page(self, after: str, size: int) -> Page:
        """Up to `size` current versions in the order of names, from the first beyond `after`."""
        query = _records.where(_is_current, _names.c.name > after).order_by(_names.c.name)
        with self._reading() as connection:
            rows = connection.execute(query.limit(size + 1)).all()
        records = tuple(_record(row) for row in rows[:size])
        return Page(records, records[-1].name if len(rows) > size else "")

    def forget(self, name: str) -> None:
        """Deletes a name's versions, but not its count. Raises AdapterError(ADAPTER_NOT_FOUND)."""
        with self._writing() as connection:
            found = connection.execute(
                sa.update(_names)
                .where(_names.c.name == name, _names.c.current_version.is_not(None))
                .values(current_version=None)
            )
            if not found.rowcount:
                raise AdapterError("ADAPTER_NOT_FOUND", f"there is no adapter {name}", name)
            connection.execute(sa.delete(_versions).where(_versions.c.name == name))

    def close(self) -> None:
        """Closes every connection. Idempotent."""
        self._engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _database_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _database_errors(), self._engine.connect() as connection:
            writing = connection.execution_options(loraplex_writes=True)
            with writing.begin():
                yield writing


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        if "full" in str(getattr(error, "orig", "")):
            raise AdapterError("STORE_FULL", "the adapter store's disk is full") from error
        raise AdapterError(
            "STORE_UNAVAILABLE", "the adapter store's index cannot be used"
        ) from error


def _configure(connection: Any, _entry: object) -> None:
    connection.isolation_level = None  # sqlite3 must not begin transactions of its own
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: sa.Connection) -> None:
    # A transaction that reads before it writes has to lock at once, or two of them deadlock.
    writes = connection.get_execution_options().get("loraplex_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _remember(connection: sa.Connection, spec: AdapterSpec, now: float) -> None:
    known = sa.select(_blobs.c.digest).where(_blobs.c.digest == spec.digest)
    if connection.execute(known).first() is None:
        summary = {
            "peft_type": spec.peft_type,
            "rank": spec.rank,
            "target_modules": list(spec.target_modules),
            "size_bytes": spec.size_bytes,
            "base_model": spec.base_model,
        }
        connection.execute(
            sa.insert(_blobs).values(digest=spec.digest, summary=summary, created_at=now)
        )


def _record(row: Any) -> Record:
    summary = row.summary
    return Record(
        name=row.name,
        version=row.version,
        digest=row.digest,
        peft_type=summary["peft_type"],
        rank=summary["rank"],
        target_modules=tuple(summary["target_modules"]),
        size_bytes=summary["size_bytes"],
        base_model=summary["base_model"],
        created_at=datetime.fromtimestamp(row.created_at, UTC),
    )
