"""A quick look at every version in use: its base, its quarantine, and whether its files are there.

It reads no adapter's files and none of its description, so that a server can repeat it often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from loraplex_adapters.store import lookup, schema

_names, _versions, _aliases = schema.names.c, schema.versions.c, schema.aliases.c


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A version that is current or that an alias points to.

    Attributes:
        base_fingerprint, base_name: as in `Record`.
        is_quarantined: whether its content is quarantined.
        is_stored: whether both of its files are in the store and not empty.
    """

    name: str
    version: int
    digest: str
    base_fingerprint: str
    base_name: str
    is_quarantined: bool
    is_stored: bool

    @property
    def id(self) -> str:
        """Adapter id of this version: "name@version"."""
        return f"{self.name}@{self.version}"


def survey(connection: sa.Connection, is_stored: Callable[[str], bool]) -> tuple[Surveyed, ...]:
    """Every version in use, in order of names and versions; `is_stored` looks at the disk."""
    pointed = sa.exists().where(lookup.is_target)
    query = (
        sa.select(
            _versions.name,
            _versions.version,
            _versions.digest,
            _versions.base_fingerprint,
            _versions.base_name,
            schema.quarantine.c.digest.is_not(None).label("is_quarantined"),
        )
        .join(schema.names, _names.name == _versions.name)
        .outerjoin(schema.quarantine, schema.quarantine.c.digest == _versions.digest)
        .where(
            _versions.deleted_at.is_(None),
            sa.or_(_versions.version == _names.current_version, pointed),
        )
        .order_by(_versions.name, _versions.version)
    )
    rows = connection.execute(query).all()
    there = {digest: is_stored(digest) for digest in {row.digest for row in rows}}
    return tuple(
        Surveyed(
            row.name,
            row.version,
            row.digest,
            row.base_fingerprint,
            row.base_name,
            bool(row.is_quarantined),
            there[row.digest],
        )
        for row in rows
    )
