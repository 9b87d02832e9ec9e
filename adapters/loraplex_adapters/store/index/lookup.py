"""Look-ups of versions and aliases within a transaction of the index."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.index import records, schema
from loraplex_adapters.store.index.ids import AdapterId
from loraplex_adapters.store.index.records import Record
from loraplex_adapters.store.index.selector import EVERYTHING, LabelSelector

_names, _versions, _aliases = schema.names.c, schema.versions.c, schema.aliases.c

is_target = sa.and_(_versions.name == _aliases.name, _versions.version == _aliases.version)

aliases = sa.select(schema.aliases, _versions.digest).join(schema.versions, is_target)
"""Query of every alias, with the digest of its version."""


def find(connection: sa.Connection, adapter: AdapterId, seen: LabelSelector = EVERYTHING) -> Record:
    """Returns the version that an id means; the newest if several have the digest.

    An alias, alone or with the digest that it points to, means its version. Versions that `seen`
    does not select are treated as if they did not exist, by the same statements.
    Raises Refusal(ADAPTER_NOT_FOUND).
    """
    query = records.living.where(_names.name == adapter.name, *seen.conditions())
    if adapter.digest is not None:
        query = query.where(_versions.digest == adapter.digest)
    elif adapter.version is not None:
        query = query.where(_versions.version == adapter.version)
    else:
        query = query.where(records.is_current)
    found = records.read_one(connection, query.order_by(_versions.version.desc()))
    if found is None and adapter.version is None:
        row = alias_row(connection, adapter.name, seen)
        if row is not None:
            found = records.read_one(connection, exactly(row.name, row.version))
    if found is None or adapter.digest not in (None, found.digest):
        which = adapter.digest or adapter.version
        raise not_found(adapter.name if which is None else f"{adapter.name}@{which}")
    return found


def exactly(name: str, version: int) -> sa.Select[Any]:
    """Query of one version that is not deleted."""
    return records.living.where(_versions.name == name, _versions.version == version)


def is_name(connection: sa.Connection, name: str) -> bool:
    """Whether `name` is the name of an adapter that is not deleted."""
    living = sa.select(_names.name).where(_names.name == name, _names.current_version.is_not(None))
    return connection.execute(living).first() is not None


def alias_row(connection: sa.Connection, alias: str, seen: LabelSelector = EVERYTHING) -> Any:
    """Returns an alias's row, with the digest of its version; None if there is no such alias.

    An alias of a version that `seen` does not select counts as none.
    """
    query = aliases.where(_aliases.alias == alias, *seen.conditions())
    return connection.execute(query).one_or_none()


def is_seen(connection: sa.Connection, name: str, version: int, seen: LabelSelector) -> bool:
    """Whether `seen` selects a version, which may be deleted."""
    if not seen.terms:
        return True
    of_version = (_versions.name == name, _versions.version == version)
    query = sa.select(_versions.version).where(*of_version, *seen.conditions())
    return connection.execute(query).first() is not None


def require_seen(connection: sa.Connection, name: str, seen: LabelSelector) -> None:
    """Raises Refusal(PERMISSION_DENIED) if a name or alias is used for a version not in `seen`.

    The refusal does not say for what: the version does not exist for whom it is told.
    """
    if not seen.terms:
        return
    current = sa.select(_names.current_version).where(_names.name == name)
    version = connection.execute(current).scalar()
    hidden = version is not None and not is_seen(connection, name, version, seen)
    if hidden or (
        alias_row(connection, name) is not None and alias_row(connection, name, seen) is None
    ):
        raise Refusal(Reason.PERMISSION_DENIED, f"{name} is not available to this caller", name)


def not_found(shown: str) -> Refusal:
    """The refusal of an id, `shown`, that means no adapter."""
    return Refusal(Reason.ADAPTER_NOT_FOUND, f"there is no adapter {shown}", shown)
