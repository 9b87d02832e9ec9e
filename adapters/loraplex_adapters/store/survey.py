"""A quick look at every version in use: its base, its quarantine, and whether its files are there.

It reads no adapter's files and none of its description, so that a server can repeat it often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.store.files.blobs import blob_at, is_complete
from loraplex_adapters.store.index import lookup, schema
from loraplex_adapters.store.index.database import Database

_names, _versions, _aliases = schema.names.c, schema.versions.c, schema.aliases.c


@dataclass(frozen=True, slots=True)
class Verified:
    """A blob that was read again.

    Attributes:
        versions: the versions that have this content, as "name@version".
        error: the fault that was found; None if the blob is intact.
    """

    digest: str
    versions: tuple[str, ...]
    error: Refusal | None

    @classmethod
    def by(cls, check: Callable[[str], None], digest: str, versions: tuple[str, ...]) -> Verified:
        """The outcome of `check`, which raises Refusal for a damaged blob.

        Raises Refusal(STORE_UNAVAILABLE) if that is what `check` raises: the blob was not read.
        """
        try:
            check(digest)
        except Refusal as error:
            if error.reason is Reason.STORE_UNAVAILABLE:
                raise
            return cls(digest, versions, error)
        return cls(digest, versions, None)


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


def survey_at(root: Path, url: str = "") -> tuple[Surveyed, ...] | None:
    """Surveys a store without opening it, so that neither its files nor its index are changed.

    Arguments as for `Store`. Returns None if a server has to bring the index up to date first.
    Raises Refusal(STORE_UNAVAILABLE) if the index cannot be read.
    """
    database = Database(root / "index.sqlite3", url)
    try:
        with database.reading() as connection:
            if not schema.is_current(connection):
                return None
            return survey(connection, lambda digest: is_complete(blob_at(root, digest)))
    finally:
        database.close()
