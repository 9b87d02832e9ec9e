"""The store as one object: content by digest, and names with immutable versions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Refusal

from loraplex_adapters.format.digest import digest_hex
from loraplex_adapters.format.examine import examine_header, inspect
from loraplex_adapters.format.files import Directory, opened
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import garbage
from loraplex_adapters.store.disk import locked
from loraplex_adapters.store.files.blobs import Blobs
from loraplex_adapters.store.files.identity import read_id, write_id
from loraplex_adapters.store.files.uploads import UploadBounds, Uploads
from loraplex_adapters.store.garbage import Collected
from loraplex_adapters.store.index import schema
from loraplex_adapters.store.index.aliases import Aliases
from loraplex_adapters.store.index.allotment import Allotment, Allotments
from loraplex_adapters.store.index.database import Database
from loraplex_adapters.store.index.ids import AdapterId, check_name, parse_id
from loraplex_adapters.store.index.index import Index
from loraplex_adapters.store.index.labels import check_keys, check_labels
from loraplex_adapters.store.index.quarantines import Quarantines
from loraplex_adapters.store.index.rebases import Rebase, Rebases
from loraplex_adapters.store.index.records import Alias, Page, Quarantine, Record
from loraplex_adapters.store.index.selector import EVERYTHING, LabelSelector
from loraplex_adapters.store.index.texts import VersionText
from loraplex_adapters.store.staging import Approval, staged
from loraplex_adapters.store.survey import Surveyed, Verified, survey

DEFAULT_PAGE = 100
MAX_PAGE = 1000
GRACE_SECONDS = 7 * 24 * 3600.0
"""Default time for which a deletion can be undone."""


class Store:
    """Adapters on disk. Safe to use from several threads, processes and servers at once.

    An id is "name" (the current version, or that of an alias), "name@3" or "name@sha256:<hex>".
    Versions that a method's `seen` does not select do not exist for it (ADAPTER_NOT_FOUND), but it
    does not take their names and aliases either (PERMISSION_DENIED).
    Every method blocks, so that it belongs in a worker thread, and may raise `Refusal` with reason
    STORE_FULL or STORE_UNAVAILABLE if the disk or the database fails. Once a method that changes
    something has returned, the change survives a power failure.

    Attributes:
        uploads: the unfinished uploads, which `finish_upload` registers.
        allotments: what principals have in the store, and early refusals because of it.
    """

    def __init__(self, root: Path, url: str = "", uploads: UploadBounds | None = None) -> None:
        """Opens the store below `root`, creating it if needed, and cleans up after crashes.

        The index is SQLite below `root`, or the PostgreSQL database `url` (an SQLAlchemy URL),
        which several servers may share together with `root`. Raises Refusal(STORE_UNAVAILABLE) if
        `root` cannot be written, or if its index cannot be read or belongs to another store.
        """
        with locked(root):
            self._database = Database(root / "index.sqlite3", url)
            self._blobs = Blobs(root)
            try:
                known_id = read_id(root)
                has_blobs = bool(self._blobs.ages(0.0))
                with self._database.writing() as connection:
                    store_id = schema.prepare(connection, known_id, has_blobs)
                if known_id is None:
                    write_id(root, store_id)
                self._index = Index(self._database)
                self._aliases = Aliases(self._database)
                self._quarantines = Quarantines(self._database)
                self._rebases = Rebases(self._database)
                self.allotments = Allotments(self._database)
                self.uploads = Uploads(root, uploads or UploadBounds())
                self.uploads.clear()
                self.uploads.expire()
                garbage.empty_trash(self._database, self._blobs)
            except BaseException:
                self.close()
                raise

    def register(
        self,
        name: str,
        source: Path | Directory,
        base: BaseInfo,
        limits: AdapterLimits | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        *,
        expected_digest: str = "",
        text: VersionText | None = None,
        seen: LabelSelector = EVERYTHING,
        allotment: Allotment | None = None,
        approve: Approval | None = None,
    ) -> tuple[Record, bool]:
        """Checks and copies the adapter in `source` and points `name` to it, as a new version.

        Returns the version, and whether it is new: False if `name` already points to this content;
        `labels` are then added to those that the version has, and the version is recorded for
        `base`. The check that decides reads the copy, so that later changes of the files have no
        effect; the version has its `notes`. `approve` checks the copy further. Content with another
        `text` is another version.
        Raises Refusal: FIELD_INVALID (name, labels, text), ADAPTER_CONFLICT (the name points to
        other content and `replace` is not set, or it is an alias), ADAPTER_INVALID (field "digest":
        the digest is not `expected_digest`), QUOTA_EXCEEDED, as `format.examine.inspect` and as
        `approve` do.
        """
        check_name(name)
        checked = check_labels(labels or {})
        text = text or VersionText()
        text.check(base.config.vocab_size)
        if expected_digest:
            digest_hex(expected_digest)
        limits = limits or AdapterLimits()
        with opened(source) as src:
            # Checked first without the weights, before gigabytes are copied.
            if findings := examine_header(src, base, limits).findings:
                raise Refusal.of(findings)
            with staged(self._blobs, src, base, limits, expected_digest, approve) as made:
                record, created = self._index.point(
                    name, made.spec, base, checked, replace, made.place, text, seen, allotment
                )
                return record.noted((*made.spec.notes, *made.notes)), created

    def admit(
        self,
        source: Path | Directory,
        base: BaseInfo,
        limits: AdapterLimits | None = None,
        expected_digest: str = "",
        approve: Approval | None = None,
    ) -> str:
        """Checks and copies the adapter in `source` without naming it; returns its digest.

        It is collected after the grace period unless it is registered. Raises Refusal as
        `register` does.
        """
        if expected_digest:
            digest_hex(expected_digest)
        limits = limits or AdapterLimits()
        with (
            opened(source) as src,
            staged(self._blobs, src, base, limits, expected_digest, approve) as made,
            self._database.writing(),
        ):
            made.place()
            return made.spec.digest

    def resolve(self, adapter_id: str, seen: LabelSelector = EVERYTHING) -> Record:
        """Returns the version that an id means now.

        Raises Refusal: FIELD_INVALID (not an id), ADAPTER_NOT_FOUND.
        """
        return self._index.find(parse_id(adapter_id), seen)

    def get(self, name: str, version: int | None = None) -> Record:
        """Returns the current or the given version of `name`; raises as `resolve` does."""
        return self._index.find(AdapterId(check_name(name), version))

    def page(
        self,
        page_size: int = 0,
        page_token: str = "",
        labels: Mapping[str, str] | None = None,
        seen: LabelSelector = EVERYTHING,
    ) -> Page:
        """A page of the current versions that carry all of `labels`, in the order of names.

        `page_size` 0 means 100; more than 1000 means 1000. Raises Refusal(FIELD_INVALID).
        """
        checked = check_labels(labels or {})
        size = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        return self._index.page(page_token, size, checked, seen)

    def current(self, labels: Mapping[str, str] | None = None) -> Iterator[Record]:
        """All current versions that carry `labels`, in the order of names, read in pages."""
        token = ""
        while True:
            page = self.page(MAX_PAGE, token, labels)
            yield from page.records
            token = page.next_page_token
            if not token:
                return

    def change_counter(self) -> int:
        """Counter that grows with every change of names, aliases and labels by any process."""
        return self._index.change_counter()

    def has_others(self, digest: str, seen: LabelSelector) -> bool:
        """Whether versions outside of `seen` have this content too."""
        return self._index.has_others(digest, seen)

    def versions(self, name: str, seen: LabelSelector = EVERYTHING) -> tuple[Record, ...]:
        """All versions of a name, newest first. Raises Refusal as `get` does."""
        return self._index.versions(check_name(name), seen)

    def chat_template(self, sha256: str) -> str:
        """Source of a chat template that a version was registered with.

        Raises Refusal(ADAPTER_CORRUPT) if the index has lost it.
        """
        return self._index.chat_template(sha256)

    def label(
        self,
        adapter_id: str,
        labels: Mapping[str, str],
        remove: Collection[str] = (),
        seen: LabelSelector = EVERYTHING,
    ) -> Record:
        """Removes the labels `remove` from a version, then adds `labels`; returns the version.

        Raises Refusal: FIELD_INVALID (id, labels, too many labels), ADAPTER_NOT_FOUND.
        """
        check_keys(remove)
        return self._index.label(parse_id(adapter_id), check_labels(labels), remove, seen)

    def set_alias(
        self,
        alias: str,
        adapter_id: str,
        expected: str | None = None,
        seen: LabelSelector = EVERYTHING,
    ) -> Alias:
        """Points `alias`, which may be new, to the version that `adapter_id` means now.

        `expected` is the id that the alias must point to before, "" if it must not exist yet, None
        for no condition. Raises Refusal: FIELD_INVALID; ADAPTER_NOT_FOUND (`adapter_id`);
        ADAPTER_CONFLICT (`expected` is not met, or `alias` is the name of an adapter).
        """
        check_name(alias)
        before = parse_id(expected) if expected else expected
        return self._aliases.set(alias, parse_id(adapter_id), before, seen)

    def delete_alias(self, alias: str, seen: LabelSelector = EVERYTHING) -> None:
        """Deletes an alias. Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        self._aliases.delete(check_name(alias), seen)

    def aliases(self) -> tuple[Alias, ...]:
        """All aliases in order, including those of deleted versions, which do not resolve."""
        return self._aliases.all()

    def delete(self, name: str, seen: LabelSelector = EVERYTHING) -> None:
        """Deletes a name and its versions; `restore` undoes that until `gc` removes them.

        The name's version numbers are never used again. Raises Refusal: FIELD_INVALID,
        ADAPTER_NOT_FOUND.
        """
        self._index.delete(check_name(name), seen)

    def restore(
        self, name: str, seen: LabelSelector = EVERYTHING, allotment: Allotment | None = None
    ) -> Record:
        """Undoes the last deletion of a name; returns its current version.

        Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND (all its versions have been collected),
        ADAPTER_CONFLICT (the name has been given to an adapter or an alias since), QUOTA_EXCEEDED.
        """
        return self._index.restore(check_name(name), seen, allotment)

    def deleted(self) -> tuple[Record, ...]:
        """The deleted versions that are not collected yet, in order of names and versions."""
        return self._index.deleted()

    def quarantine(self, digest: str, reason: str) -> bool:
        """Marks content as not to be served, under any name, until `release`.

        `reason` is a sentence for operators and clients; it is cut to 1000 characters. Returns
        False if the content is quarantined already, with its earlier reason. Content that is
        registered again is still quarantined. Raises Refusal(FIELD_INVALID): not a digest.
        """
        digest_hex(digest)
        return self._quarantines.add(digest, reason)

    def release(self, digest: str) -> bool:
        """Ends a quarantine; False if there was none. Raises Refusal(FIELD_INVALID)."""
        digest_hex(digest)
        return self._quarantines.remove(digest)

    def quarantined(self) -> Mapping[str, Quarantine]:
        """The quarantines by digest, the oldest first."""
        return self._quarantines.all()

    def rebase(
        self, adapter_id: str, base: BaseInfo, limits: AdapterLimits | None = None
    ) -> Record:
        """Checks a version against `base` and records it for `base`; returns the version.

        The move is recorded for good (`rebases`). Raises Refusal: as `resolve` does,
        ADAPTER_CORRUPT, and as `format.examine.inspect` does if the adapter does not fit.
        """
        record = self.resolve(adapter_id)
        self._blobs.check(record.digest)
        inspect(self.path(record.digest), base, limits)
        return self._rebases.move(record, base)

    def rebases(self) -> tuple[Rebase, ...]:
        """Every version's move to another base, the oldest first."""
        return self._rebases.all()

    def gc(
        self,
        grace_seconds: float = GRACE_SECONDS,
        keep: Collection[str] = (),
        dry_run: bool = False,
    ) -> Collected:
        """Removes versions deleted `grace_seconds` ago, old blobs without one, expired uploads.

        Blobs whose digests are in `keep`, because this server uses them, stay. Blobs that other
        servers use stay if the grace is longer than any request of theirs. `dry_run` only reports.
        """
        return garbage.collect(
            self._database, self._blobs, self.uploads, grace_seconds, keep, dry_run
        )

    def finish_upload(
        self,
        upload_id: str,
        name: str,
        expected_digest: str,
        base: BaseInfo,
        limits: AdapterLimits | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
        *,
        text: VersionText | None = None,
        seen: LabelSelector = EVERYTHING,
        owner: str | None = None,
        allotment: Allotment | None = None,
        approve: Approval | None = None,
    ) -> tuple[Record, bool]:
        """Registers an upload whose digest is `expected_digest` ("" for any), and removes it.

        A refused upload stays; it can be finished in another way or aborted. Raises Refusal:
        UPLOAD_NOT_FOUND (as `Uploads.reading`), FIELD_INVALID (digest), and as `register` does.
        """
        with self.uploads.reading(upload_id, owner, remove=True) as source:
            terms = (name, source, base, limits, replace, labels)
            return self.register(
                *terms,
                expected_digest=expected_digest,
                text=text,
                seen=seen,
                allotment=allotment,
                approve=approve,
            )

    def path(self, digest: str) -> Path:
        """The directory of an adapter's files. Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        return self._blobs.path(digest)

    def directory(self, digest: str) -> Path:
        """The directory of an adapter's files, existing or not. Raises Refusal(FIELD_INVALID)."""
        return self._blobs.directory(digest)

    def survey(self) -> tuple[Surveyed, ...]:
        """Every version that is current or has an alias, and what is wrong with it."""
        with self._database.reading() as connection:
            return survey(connection, self._blobs.is_complete)

    def verify(self, digest: str) -> None:
        """Reads an adapter's files again and compares their digest.

        Raises Refusal: ADAPTER_CORRUPT (the digest differs), FIELD_INVALID, ADAPTER_NOT_FOUND.
        """
        self._blobs.verify(digest)

    def verify_all(self) -> Iterator[Verified]:
        """Verifies the content of every version, including deleted ones, in order of digests."""
        for digest, versions in self._index.users().items():
            yield Verified.by(self._blobs.check, digest, versions)

    def verify_version(self, adapter_id: str) -> Verified:
        """Verifies the content of one version. Raises Refusal as `resolve` does."""
        record = self.resolve(adapter_id)
        return Verified.by(self._blobs.check, record.digest, (record.id,))

    def close(self) -> None:
        """Closes the index and removes the staging area. Idempotent."""
        self._database.close()
        self._blobs.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
