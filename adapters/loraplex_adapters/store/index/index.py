"""Names, versions and labels, and the digests that they point to. A change is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import sqlalchemy as sa
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.spec import CheckedAdapter
from loraplex_adapters.store.index import lookup, rebases, records, schema, texts
from loraplex_adapters.store.index.allotment import Allotment, holding, require_room
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.ids import AdapterId, is_name
from loraplex_adapters.store.index.labels import check_count
from loraplex_adapters.store.index.records import Page, Record
from loraplex_adapters.store.index.selector import EVERYTHING, LabelSelector
from loraplex_adapters.store.index.texts import VersionText

_names, _versions, _blobs = schema.names.c, schema.versions.c, schema.blobs.c
_labels = schema.labels.c


class Index:
    """Names, versions and labels. Safe to use from several threads and processes.

    Every method raises Refusal(STORE_UNAVAILABLE or STORE_FULL) if the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def point(
        self,
        name: str,
        spec: CheckedAdapter,
        base: BaseInfo,
        labels: Mapping[str, str],
        replace: bool,
        place: Callable[[], bool],
        text: VersionText | None = None,
        seen: LabelSelector = EVERYTHING,
        allotment: Allotment | None = None,
    ) -> tuple[Record, bool]:
        """Points a name to content; returns the version, and True if the version is new.

        `base` is the one that the adapter was checked against: a version that exists is recorded
        for it. The same content with another `text` is other content. The version gets `labels` in
        addition to those it has. `place` puts the content into
        the store, unless it is there, and returns whether it did. It is called within the change,
        so that the content cannot be collected before a name points to it.
        Raises Refusal: ADAPTER_CONFLICT if the name points to other content and `replace` is not
        set, or is an alias; PERMISSION_DENIED if it is used for a version that is not in `seen`;
        FIELD_INVALID for too many labels; QUOTA_EXCEEDED if the version would be more than
        `allotment` allows.
        """
        with self._database.writing() as connection:
            lookup.require_seen(connection, name, seen)
            if lookup.alias_row(connection, name) is not None:
                raise Refusal(Reason.ADAPTER_CONFLICT, f"{name} is an alias", name)
            current = connection.execute(
                records.living.where(_names.name == name, records.is_current)
            ).one_or_none()
            text = text or VersionText()
            same_content = current is not None and current.digest == spec.digest
            if current is not None and same_content and _has_text(current, text):
                if allotment is not None and labels:
                    old = records.read(connection, [current])[0]
                    carried = {**old.labels, **labels}
                    require_room(connection, allotment, name, carried, spec.size_bytes)
                changed = place()
                changed |= _describe(connection, spec)
                changed |= rebases.move(connection, current, base)
                if labels:
                    _put_labels(connection, name, current.version, labels)
                if changed or labels:
                    schema.count_change(connection)
                found = records.read_one(connection, lookup.exactly(name, current.version))
                assert found is not None
                return found, False
            if current is not None and not replace:
                raise _taken(current, same_content)
            if allotment is not None:
                require_room(connection, allotment, name, labels, spec.size_bytes)
            place()
            version = _add_version(connection, name, spec, base)
            _put_labels(connection, name, version, labels)
            texts.put(connection, name, version, text)
            schema.count_change(connection)
            made = records.read_one(connection, lookup.exactly(name, version))
            assert made is not None
            return made, True

    def find(self, adapter: AdapterId, seen: LabelSelector = EVERYTHING) -> Record:
        """Returns the version that an id means, as `lookup.find` does."""
        with self._database.reading() as connection:
            return lookup.find(connection, adapter, seen)

    def page(
        self, after: str, size: int, labels: Mapping[str, str], seen: LabelSelector = EVERYTHING
    ) -> Page:
        """Up to `size` current versions in `seen` that carry `labels`, in order of names.

        They begin after the name `after`, which need not exist. Raises Refusal(FIELD_INVALID).
        """
        if size < 0:
            raise Refusal(Reason.FIELD_INVALID, "page_size must not be negative", "page_size")
        if after and not is_name(after):
            message = "page_token must be a next_page_token of an earlier page"
            raise Refusal(Reason.FIELD_INVALID, message, "page_token")
        query = records.living.where(records.is_current, _names.name > after, *seen.conditions())
        for key, value in labels.items():
            query = query.where(
                sa.exists().where(
                    _labels.name == _versions.name,
                    _labels.version == _versions.version,
                    _labels.key == key,
                    _labels.value == value,
                )
            )
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_names.name).limit(size + 1)).all()
            found = records.read(connection, rows[:size])
        return Page(found, found[-1].name if len(rows) > size else "")

    def versions(self, name: str, seen: LabelSelector = EVERYTHING) -> tuple[Record, ...]:
        """A name's versions in `seen`, newest first. Raises Refusal(ADAPTER_NOT_FOUND)."""
        query = records.living.where(_names.name == name, *seen.conditions())
        newest_first = query.order_by(_versions.version.desc())
        with self._database.reading() as connection:
            found = records.read(connection, connection.execute(newest_first).all())
        if not found:
            raise lookup.not_found(name)
        return found

    def has_others(self, digest: str, seen: LabelSelector) -> bool:
        """Whether versions that are not deleted have this content and are not in `seen`."""
        conditions = seen.conditions()
        if not conditions:
            return False
        living = (_versions.digest == digest, _versions.deleted_at.is_(None))
        query = sa.select(_versions.name).where(*living, sa.not_(sa.and_(*conditions)))
        with self._database.reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def deleted(self) -> tuple[Record, ...]:
        """The deleted versions that are not collected yet, in order of names and versions."""
        query = records.versions.where(_versions.deleted_at.is_not(None))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(_names.name, _versions.version)).all()
            return records.read(connection, rows)

    def label(
        self,
        adapter: AdapterId,
        labels: Mapping[str, str],
        remove: Collection[str],
        seen: LabelSelector = EVERYTHING,
    ) -> Record:
        """Removes the labels `remove` from a version, then adds `labels`; returns the version.

        Raises Refusal: ADAPTER_NOT_FOUND; FIELD_INVALID for too many labels.
        """
        with self._database.writing() as connection:
            record = lookup.find(connection, adapter, seen)
            connection.execute(
                sa.delete(schema.labels).where(
                    _labels.name == record.name,
                    _labels.version == record.version,
                    _labels.key.in_(remove),
                )
            )
            _put_labels(connection, record.name, record.version, labels)
            schema.count_change(connection)
            return lookup.find(connection, AdapterId(record.name, record.version))

    def delete(self, name: str, seen: LabelSelector = EVERYTHING) -> None:
        """Marks a name and its versions as deleted.

        Raises Refusal(ADAPTER_NOT_FOUND), also if its current version is not in `seen`.
        """
        of_name = _names.name == name
        with self._database.writing() as connection:
            current = connection.execute(sa.select(_names.current_version).where(of_name)).scalar()
            if current is None or not lookup.is_seen(connection, name, current, seen):
                raise lookup.not_found(name)
            connection.execute(sa.update(schema.names).where(of_name).values(current_version=None))
            connection.execute(
                sa.update(schema.versions)
                .where(_versions.name == name, _versions.deleted_at.is_(None))
                .values(deleted_at=time.time())
            )
            schema.count_change(connection)

    def restore(
        self, name: str, seen: LabelSelector = EVERYTHING, allotment: Allotment | None = None
    ) -> Record:
        """Undoes a name's last deletion; returns its current version.

        Raises Refusal: ADAPTER_NOT_FOUND if all its versions have been collected, or the one that
        was current is not in `seen`; ADAPTER_CONFLICT if the name has been registered again or is
        an alias now; PERMISSION_DENIED if that is so for a version that is not in `seen`;
        QUOTA_EXCEEDED as `point`.
        """
        with self._database.writing() as connection:
            lookup.require_seen(connection, name, seen)
            if lookup.is_name(connection, name) or lookup.alias_row(connection, name) is not None:
                message = f"{name} is in use again, as an adapter's name or as an alias"
                raise Refusal(Reason.ADAPTER_CONFLICT, message, name)
            of_name = _versions.name == name
            deleted = sa.select(_versions.version, _versions.deleted_at).where(
                of_name, _versions.deleted_at.is_not(None)
            )
            # The last deletion has the highest version. Times cannot tell: a clock may be set back.
            latest = deleted.order_by(_versions.version.desc())
            last = connection.execute(latest).first()
            if last is None or not lookup.is_seen(connection, name, last.version, seen):
                raise lookup.not_found(name)
            before = None if allotment is None else holding(connection, allotment.selector)
            deletion = sa.and_(of_name, _versions.deleted_at == last.deleted_at)
            connection.execute(sa.update(schema.versions).where(deletion).values(deleted_at=None))
            of_row = sa.update(schema.names).where(_names.name == name)
            connection.execute(of_row.values(current_version=last.version))
            if allotment is not None and before is not None:
                allotment.require(before, holding(connection, allotment.selector))
            schema.count_change(connection)
            return lookup.find(connection, AdapterId(name))

    def chat_template(self, sha256: str) -> str:
        """Source of a template, as `texts.template` returns it."""
        with self._database.reading() as connection:
            return texts.template(connection, sha256)

    def change_counter(self) -> int:
        """Counter that grows with every change of names, aliases and labels by any process."""
        with self._database.reading() as connection:
            return schema.changes(connection)

    def users(self) -> dict[str, tuple[str, ...]]:
        """Maps every digest in use to the "name@version" ids that use it, deleted ones included."""
        query = sa.select(_versions.digest, _versions.name, _versions.version)
        found: dict[str, tuple[str, ...]] = {}
        with self._database.reading() as connection:
            for digest, name, version in connection.execute(
                query.order_by(_versions.digest, _versions.name, _versions.version)
            ):
                found[digest] = (*found.get(digest, ()), f"{name}@{version}")
        return found


def _add_version(connection: sa.Connection, name: str, spec: CheckedAdapter, base: BaseInfo) -> int:
    now, digest = time.time(), spec.digest
    _describe(connection, spec)
    last = connection.execute(sa.select(_names.last_version).where(_names.name == name)).scalar()
    version = (last or 0) + 1
    row = {"current_version": version, "last_version": version}
    if last is None:
        connection.execute(sa.insert(schema.names).values(name=name, **row))
    else:
        connection.execute(sa.update(schema.names).where(_names.name == name).values(row))
    connection.execute(
        sa.insert(schema.versions).values(
            name=name,
            version=version,
            digest=digest,
            created_at=now,
            base_fingerprint=base.fingerprint,
            base_name=base.name,
        )
    )
    return version


def _taken(current: sa.Row[Any], same_content: bool) -> Refusal:
    message = f"{current.name} already names other content ({current.digest})"
    if same_content:
        message = f"{current.name} has this content with another chat template or end tokens"
    message += "; replace it or use another name"
    return Refusal(Reason.ADAPTER_CONFLICT, message, current.name)


def _has_text(row: sa.Row[Any], text: VersionText) -> bool:
    of_row = (row.chat_template_sha256 or "", tuple(row.eos_token_ids or ()))
    return of_row == (text.template_sha256, text.eos_token_ids)


def _describe(connection: sa.Connection, spec: CheckedAdapter) -> bool:
    """Writes the description of content; False if it is there already."""
    about = records.summary(spec)
    found = connection.execute(
        sa.select(_blobs.summary).where(_blobs.digest == spec.digest)
    ).one_or_none()
    if found is None:
        row = {"digest": spec.digest, "summary": about, "created_at": time.time()}
        connection.execute(sa.insert(schema.blobs).values(row))
    elif found.summary != about:  # damaged, or an older server recorded less
        changed = sa.update(schema.blobs).where(_blobs.digest == spec.digest)
        connection.execute(changed.values(summary=about))
    else:
        return False
    return True


def _put_labels(
    connection: sa.Connection, name: str, version: int, labels: Mapping[str, str]
) -> None:
    if not labels:
        return
    of_version = sa.and_(_labels.name == name, _labels.version == version)
    connection.execute(sa.delete(schema.labels).where(of_version, _labels.key.in_(labels)))
    rows = [
        {"name": name, "version": version, "key": key, "value": value}
        for key, value in labels.items()
    ]
    connection.execute(sa.insert(schema.labels), rows)
    check_count(
        connection.execute(
            sa.select(sa.func.count()).select_from(schema.labels).where(of_version)
        ).scalar_one()
    )
