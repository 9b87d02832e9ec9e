"""Versions as the index describes them, and the queries that read them from the tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from loraplex_adapters.format.spec import CheckedAdapter
from loraplex_adapters.store.index import schema

_MOST_NAMES = 1000
_UNDESCRIBED: Mapping[str, Any] = MappingProxyType(
    {"peft_type": "", "rank": 0, "target_modules": (), "size_bytes": 0, "base_model": ""}
)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Content that must not be served until an operator releases it; `since` is in UTC."""

    digest: str
    reason: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Record:
    """One version of a registered adapter. Times are in UTC.

    Attributes:
        base_fingerprint: fingerprint of the base that the adapter was checked against; "" if the
            version was registered before fingerprints were recorded.
        base_name: name of that base; "" if the version was registered before names were recorded.
        quarantine: why the content must not be served; None if it may be.
        is_described: False if the description in the index is damaged. Then what `CheckedAdapter`
            has is empty here, until the same files are registered again.
        deleted_at: time of deletion; None if the version is not deleted.
        notes: what the check found that the adapter's owner should know; only in the result of a
            registration, and not compared.
        labels, aliases: as they were when the record was read. `aliases` are sorted.
        chat_template_sha256, eos_token_ids: what `VersionText` the version has; "" and () without.
        others: as in `CheckedAdapter`.
    """

    name: str
    version: int
    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    base_model: str
    created_at: datetime
    virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    base_fingerprint: str = ""
    deleted_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    base_name: str = ""
    quarantine: Quarantine | None = None
    is_described: bool = True
    chat_template_sha256: str = ""
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def id(self) -> str:
        """Adapter id of this version: "name@version"."""
        return f"{self.name}@{self.version}"

    def noted(self, notes: tuple[str, ...]) -> Record:
        """The same version with notes of its registration."""
        return replace(self, notes=notes)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing; `next_page_token` is "" on the last page."""

    records: tuple[Record, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class Alias:
    """A second name for one version, which can be moved to another version."""

    alias: str
    name: str
    version: int
    digest: str
    updated_at: datetime


versions = (
    sa.select(
        schema.versions,
        schema.blobs.c.summary,
        schema.quarantine.c.reason.label("quarantine_reason"),
        schema.quarantine.c.created_at.label("quarantined_at"),
        schema.version_texts.c.template.label("chat_template_sha256"),
        schema.version_texts.c.eos_token_ids,
    )
    .join(schema.blobs, schema.blobs.c.digest == schema.versions.c.digest)
    .join(schema.names, schema.names.c.name == schema.versions.c.name)
    .outerjoin(schema.quarantine, schema.quarantine.c.digest == schema.versions.c.digest)
    .outerjoin(
        schema.version_texts,
        sa.and_(
            schema.version_texts.c.name == schema.versions.c.name,
            schema.version_texts.c.version == schema.versions.c.version,
        ),
    )
)
"""Query of every version, including deleted ones."""

living = versions.where(schema.versions.c.deleted_at.is_(None))
is_current = schema.versions.c.version == schema.names.c.current_version


def summary(spec: CheckedAdapter) -> dict[str, object]:
    """The fields of a spec that a blob's row stores, as JSON."""
    about: dict[str, object] = {
        "peft_type": spec.peft_type,
        "rank": spec.rank,
        "target_modules": list(spec.target_modules),
        "size_bytes": spec.size_bytes,
        "base_model": spec.base_model,
        "virtual_tokens": spec.virtual_tokens,
        "provenance": dict(spec.provenance),
    }
    if spec.invocation_tokens:  # so that the rows of other adapters stay as they are
        about["invocation_tokens"] = list(spec.invocation_tokens)
    return about


def read(connection: sa.Connection, rows: Sequence[Any]) -> tuple[Record, ...]:
    """Returns the records of rows of `versions`, with their labels and aliases."""
    if not rows:
        return ()
    names = sorted({row.name for row in rows})
    labels: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
    of_label, of_alias = schema.labels.c, schema.aliases.c
    # A statement has a bounded number of parameters on every database.
    for start in range(0, len(names), _MOST_NAMES):
        some = names[start : start + _MOST_NAMES]
        for row in connection.execute(
            sa.select(schema.labels).where(of_label.name.in_(some)).order_by(of_label.key)
        ):
            labels[row.name, row.version][row.key] = row.value
        for row in connection.execute(
            sa.select(schema.aliases).where(of_alias.name.in_(some)).order_by(of_alias.alias)
        ):
            aliases[row.name, row.version].append(row.alias)
    return tuple(_record(row, labels, aliases) for row in rows)


def read_one(connection: sa.Connection, query: sa.Select[Any]) -> Record | None:
    """Returns the record of the first row of a query over `versions`; None if there is no row."""
    row = connection.execute(query.limit(1)).first()
    return None if row is None else read(connection, [row])[0]


def moment(seconds: float) -> datetime:
    """Converts a time in the tables, in seconds since 1970, to UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def _record(
    row: Any,
    labels: Mapping[tuple[str, int], dict[str, str]],
    aliases: Mapping[tuple[str, int], list[str]],
) -> Record:
    about, key = row.summary, (row.name, row.version)
    is_described = isinstance(about, dict) and _UNDESCRIBED.keys() <= about.keys()
    if not is_described:
        about = _UNDESCRIBED
    return Record(
        name=row.name,
        version=row.version,
        digest=row.digest,
        peft_type=about["peft_type"],
        rank=about["rank"],
        target_modules=tuple(about["target_modules"]),
        size_bytes=about["size_bytes"],
        base_model=about["base_model"],
        created_at=moment(row.created_at),
        virtual_tokens=about.get("virtual_tokens", 0),
        invocation_tokens=tuple(about.get("invocation_tokens", ())),
        provenance=about.get("provenance", {}),
        base_fingerprint=row.base_fingerprint,
        deleted_at=None if row.deleted_at is None else moment(row.deleted_at),
        labels=labels.get(key, {}),
        aliases=tuple(aliases.get(key, ())),
        base_name=row.base_name,
        is_described=is_described,
        chat_template_sha256=row.chat_template_sha256 or "",
        eos_token_ids=tuple(row.eos_token_ids or ()),
        quarantine=(
            None
            if row.quarantined_at is None
            else Quarantine(row.digest, row.quarantine_reason, moment(row.quarantined_at))
        ),
    )
