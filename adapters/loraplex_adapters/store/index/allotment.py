"""How many adapters a principal may have, and how many bytes, and what it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from loraplex_model.base.refusal import quota_exceeded

from loraplex_adapters.store.index import records, schema
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.selector import LabelSelector

_names, _versions, _blobs = schema.names.c, schema.versions.c, schema.blobs.c


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a principal may have among the current versions that its selector matches.

    Attributes:
        holder: the principal's name.
        adapters: number of adapters; None sets no limit.
        store_bytes: bytes of them; content that two adapters have counts twice. None: no limit.
        arriving_bytes: bytes of unfinished uploads, which count as well.
        data_bytes: bytes of files of examples for training, which count as well.
    """

    holder: str
    selector: LabelSelector
    adapters: int | None = None
    store_bytes: int | None = None
    arriving_bytes: int = 0
    data_bytes: int = 0

    def require(self, before: Holding, after: Holding) -> None:
        """Raises Refusal(QUOTA_EXCEEDED) for a change to more than there may be.

        What was there before stays, even if it is more than there may be now.
        """
        most = self.adapters
        if most is not None and after.adapters > max(most, before.adapters):
            text = f"may have {most} adapters and has {before.adapters}; delete some"
            raise quota_exceeded(self.holder, "adapters", text)
        most = self.store_bytes
        if most is None or after.nbytes <= before.nbytes:
            return
        beside = self.arriving_bytes + self.data_bytes
        if after.nbytes + beside > most:
            text = f"may have {most} bytes of adapters and has {before.nbytes}"
            if self.arriving_bytes:
                text += f", and {self.arriving_bytes} of unfinished uploads"
            if self.data_bytes:
                text += f", and {self.data_bytes} of data files"
            text += f"; with this one it would have {after.nbytes + self.data_bytes}; delete some"
            raise quota_exceeded(self.holder, "store_bytes", text)


@dataclass(frozen=True, slots=True)
class Holding:
    """Number of adapters, and bytes of their current versions."""

    adapters: int
    nbytes: int

    def replacing(self, old: Holding, size: int) -> Holding:
        """The same with one adapter of `size` bytes in place of `old`."""
        return Holding(self.adapters - old.adapters + 1, self.nbytes - old.nbytes + size)


class Allotments:
    """Checks allotments outside of changes, for early refusals."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def require(
        self, allotment: Allotment, name: str, labels: Mapping[str, str], size: int = 0
    ) -> None:
        """Raises Refusal(QUOTA_EXCEEDED) if `name` could not be registered now with `size` bytes.

        `labels` are those that the version would have.
        """
        with self._database.reading() as connection:
            require_room(connection, allotment, name, labels, size)

    def held(self, allotment: Allotment) -> Holding:
        """What there is of it now."""
        with self._database.reading() as connection:
            return holding(connection, allotment.selector)


def require_room(
    connection: sa.Connection,
    allotment: Allotment,
    name: str,
    labels: Mapping[str, str],
    size: int,
) -> None:
    """Raises Refusal(QUOTA_EXCEEDED) if `name` may not get a version of `size` bytes.

    `labels` are those that the version will have. To be called before the name changes.
    """
    if allotment.selector.matches(labels):
        there = holding(connection, allotment.selector)
        old = holding(connection, allotment.selector, name)
        allotment.require(there, there.replacing(old, size))


def holding(connection: sa.Connection, selector: LabelSelector, name: str = "") -> Holding:
    """What there is among the current versions that a selector matches, or just that of `name`."""
    query = (
        sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_size(connection)), 0))
        .select_from(schema.versions)
        .join(schema.names, _names.name == _versions.name)
        .join(schema.blobs, _blobs.digest == _versions.digest)
        .where(_versions.deleted_at.is_(None), records.is_current, *selector.conditions())
    )
    if name:
        query = query.where(_versions.name == name)
    count, nbytes = connection.execute(query).one()
    return Holding(int(count), int(nbytes))


def _size(connection: sa.Connection) -> sa.ColumnElement[int]:
    """The bytes that a row of `blobs` describes; 0 if the description is damaged."""
    size = sa.cast(_blobs.summary["size_bytes"].as_string(), sa.BigInteger)
    if connection.dialect.name != "sqlite":  # which alone accepts text that is not JSON
        return size
    return sa.case((sa.func.json_valid(_blobs.summary) == 1, size), else_=0)
