"""The tables of the index, and the migration of older ones.

Content is immutable; names move. A version is a row whose content never changes. A name's row holds
its current version and the highest version number ever used; it outlives the name's deletion, so
that "name@3" never comes to mean other content. A deleted version keeps its row, with the time of
its deletion, until it is collected.

`meta` holds the schema's version, the store's id and the number of changes. SQLite's own
`user_version` is set too, because older servers read it to refuse a newer index. Tables and columns
that older servers can ignore are added without a new version, so that an older server can still
open the index.
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from loraplex_model.base.faults import reach

from loraplex_adapters.store.disk import unavailable

SCHEMA_VERSION = 2
_VERSION, _STORE_ID, _CHANGES = "schema_version", "store_id", "changes"

# Names are compared byte by byte on every database, so that listings have the same order.
_text = sa.String().with_variant(sa.String(collation="C"), "postgresql")

tables = sa.MetaData()
meta = sa.Table(
    "meta",
    tables,
    sa.Column("key", _text, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
blobs = sa.Table(
    "blobs",
    tables,
    sa.Column("digest", _text, primary_key=True),
    sa.Column("summary", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
names = sa.Table(
    "names",
    tables,
    sa.Column("name", _text, primary_key=True),
    sa.Column("current_version", sa.Integer),  # null: the name was deleted
    sa.Column("last_version", sa.Integer, nullable=False),
)
versions = sa.Table(
    "versions",
    tables,
    sa.Column("name", _text, sa.ForeignKey("names.name"), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", _text, sa.ForeignKey("blobs.digest"), nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("base_fingerprint", sa.String, nullable=False, server_default=""),
    sa.Column("deleted_at", sa.Float),  # null: not deleted
    sa.Column("base_name", sa.String, nullable=False, server_default=""),
)
aliases = sa.Table(
    "aliases",
    tables,
    sa.Column("alias", _text, primary_key=True),
    sa.Column("name", _text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
    sa.Index("ix_aliases_target", "name", "version"),
)
labels = sa.Table(
    "labels",
    tables,
    sa.Column("name", _text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("key", _text, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
    sa.Index("ix_labels_key_value", "key", "value"),
)
# A row belongs to the content, whether or not a version has it, and outlives the content.
quarantine = sa.Table(
    "quarantine",
    tables,
    sa.Column("digest", _text, primary_key=True),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
# A permanent record, which outlives the versions.
rebases = sa.Table(
    "rebases",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", _text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", _text, nullable=False),
    sa.Column("old_fingerprint", sa.String, nullable=False),
    sa.Column("old_base", sa.String, nullable=False),
    sa.Column("new_fingerprint", sa.String, nullable=False),
    sa.Column("new_base", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

# The two tables below refer to versions without a foreign key: an older server, which does not know
# them, must be able to remove versions. Numbers of versions are never used again.
chat_templates = sa.Table(
    "chat_templates",
    tables,
    sa.Column("sha256", _text, primary_key=True),
    sa.Column("source", sa.String, nullable=False),
)
version_texts = sa.Table(
    "version_texts",
    tables,
    sa.Column("name", _text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("template", _text, nullable=False, index=True),  # "" without one
    sa.Column("eos_token_ids", sa.JSON, nullable=False),
)


def prepare(connection: sa.Connection, known_id: str | None, has_blobs: bool) -> str:
    """Creates or upgrades the tables in this transaction; returns the id of the store.

    `known_id` is the id in the store's directory, None if there is none. Raises
    Refusal(STORE_UNAVAILABLE) for an index of another version, or of another store.
    """
    found = version(connection)
    require_not_newer(found)
    if found not in (0, 1, SCHEMA_VERSION):
        raise unavailable("the adapter store's index is damaged: it does not say its version")
    if found == 0 and known_id is not None and has_blobs:
        raise unavailable(
            "the adapter store has adapters, but its index is empty: restore the index, or remove "
            "the file store-id to begin with an empty index"
        )
    if found < SCHEMA_VERSION:
        if found == 1:
            _add_columns(connection)
            _add_ignorable(connection)
        create(connection)
        reach("store.index.migrate")
        store_id = known_id or uuid.uuid4().hex
        rows = [
            {"key": _VERSION, "value": str(SCHEMA_VERSION)},
            {"key": _STORE_ID, "value": store_id},
            {"key": _CHANGES, "value": "0"},
        ]
        connection.execute(sa.insert(meta), rows)
        return store_id
    _add_ignorable(connection)
    changes(connection)
    recorded = _meta(connection, _STORE_ID)
    if known_id not in (None, recorded):
        raise unavailable("the adapter store's directory and index do not belong together")
    return recorded


def require_not_newer(found: int) -> None:
    """Raises Refusal(STORE_UNAVAILABLE) for an index that only newer servers can read."""
    if found > SCHEMA_VERSION:
        raise unavailable(
            f"the adapter store was written by a newer version of the server: its index is of "
            f"version {found}, and this server reads versions 1 to {SCHEMA_VERSION}"
        )


def create(connection: sa.Connection) -> None:
    """Makes the tables that are missing, without rows, and notes the version for SQLite."""
    tables.create_all(connection)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def is_current(connection: sa.Connection) -> bool:
    """Whether the index has all tables and columns; otherwise `prepare` will add them."""
    present = sa.inspect(connection)
    return present.has_table(version_texts.name) and version(connection) == SCHEMA_VERSION


def changes(connection: sa.Connection) -> int:
    """Number of changes of names, aliases and labels so far.

    Raises Refusal(STORE_UNAVAILABLE) if the index is damaged.
    """
    text = _meta(connection, _CHANGES)
    if not text.isdecimal():
        raise unavailable("the adapter store's index is damaged: it has no count of its changes")
    return int(text)


def count_change(connection: sa.Connection) -> None:
    """Counts a change, within that change's transaction."""
    values = {"value": str(changes(connection) + 1)}
    connection.execute(sa.update(meta).where(meta.c.key == _CHANGES).values(values))


def version(connection: sa.Connection) -> int:
    """Version of the index: 0 if there is none, -1 if it is damaged."""
    present = sa.inspect(connection)
    if present.has_table(meta.name):
        text = _meta(connection, _VERSION)
        return int(text) if text.isdecimal() else -1
    return 1 if present.has_table(names.name) else 0


def _meta(connection: sa.Connection, key: str) -> str:
    found = connection.execute(sa.select(meta.c.value).where(meta.c.key == key)).scalar()
    return str(found or "")


def _add_columns(connection: sa.Connection) -> None:
    # Version 1 existed on SQLite only, and removed deleted versions at once.
    for column in ("base_fingerprint VARCHAR NOT NULL DEFAULT ''", "deleted_at FLOAT"):
        connection.exec_driver_sql(f"ALTER TABLE versions ADD COLUMN {column}")


def _add_ignorable(connection: sa.Connection) -> None:
    """Adds the tables and the column that older servers of the same version do not have."""
    present = sa.inspect(connection)
    if versions.c.base_name.name not in {c["name"] for c in present.get_columns(versions.name)}:
        connection.exec_driver_sql(
            "ALTER TABLE versions ADD COLUMN base_name VARCHAR NOT NULL DEFAULT ''"
        )
    tables.create_all(connection, [quarantine, rebases, chat_templates, version_texts])
