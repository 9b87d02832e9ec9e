"""The adapters a server knows: content by digest, and names with immutable versions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_adapters.format.digest import digest_hex
from loraplex_adapters.format.examine import inspect, survey
from loraplex_adapters.format.files import Directory, open_directory
from loraplex_adapters.format.spec import AdapterLimits, AdapterSpec
from loraplex_adapters.store import garbage, schema
from loraplex_adapters.store.aliases import Aliases
from loraplex_adapters.store.blobs import Blobs
from loraplex_adapters.store.database import Database
from loraplex_adapters.store.disk import locked
from loraplex_adapters.store.garbage import Collected
from loraplex_adapters.store.identity import read_id, write_id
from loraplex_adapters.store.ids import AdapterId, check_name, parse_id
from loraplex_adapters.store.index import Index, Registration
from loraplex_adapters.store.labels import check_keys, check_labels
from loraplex_adapters.store.records import Alias, Page, Record
from loraplex_adapters.store.uploads import Upload, UploadBounds, Uploads

DEFAULT_PAGE = 100
MAX_PAGE = 1000
GRACE_SECONDS = 7 * 24 * 3600.0
"""How long a deletion can be taken back, unless the operator says otherwise."""

_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Verified:
    """A blob that was read again: the "name@version"s that need it, and what is wrong, or None."""

    digest: str
    versions: tuple[str, ...]
    error: Refusal | None


class Store:
    """Adapters on disk. Safe to use from several threads, processes and servers at once.

    An id is "name" (its current version, or an alias's), "name@3" or "name@sha256:<hex>". Every
    method blocks (call it in a worker thread) and may raise `Refusal` with reason STORE_FULL
    or STORE_UNAVAILABLE when the disk or the database does not do its part. When a method that
    changes something returns, the change survives a power cut.
    """

    def __init__(self, root: Path, url: str = "", uploads: UploadBounds | None = None) -> None:
        """Opens the store below `root`, making it if there is none, and clears what crashes left.

        The index is SQLite below `root`, or the PostgreSQL database `url` (in SQLAlchemy's form),
        which several servers may share together with `root`. Raises Refusal(STORE_UNAVAILABLE)
        when `root` cannot be written, or its index not read or not meant for it.
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
                self._uploads = Uploads(root, uploads or UploadBounds())
                self._uploads.clear()
                self._uploads.expire()
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
    ) -> tuple[Record, bool]:
        """Checks and copies the adapter in `source` and points `name` to it, as a new version.

        Returns the record and whether it is new: False when `name` already points to these bytes;
        `labels` are added to those of that version. What is checked in the end is the copy, so
        nobody can change the files in between.
        Raises Refusal: FIELD_INVALID (name, labels), ADAPTER_CONFLICT (the name holds other
        bytes and `replace` is not set, or it is an alias), ADAPTER_INVALID (field "digest": the
        bytes are not those of `expected_digest`), and whatever `format.inspect` finds.
        """
        check_name(name)
        checked = check_labels(labels or {})
        if expected_digest:
            digest_hex(expected_digest)
        limits = limits or AdapterLimits()
        with (
            nullcontext(source) if isinstance(source, Directory) else open_directory(source) as src
        ):
            hopeless = survey(src, base, limits).findings  # before gigabytes are copied
            if hopeless:
                raise Refusal.of(hopeless)
            for _ in range(_ATTEMPTS):
                spec = self._admit(src, base, limits, expected_digest)
                wanted = Registration(name, spec, base.fingerprint, checked, replace)
                outcome = self._index.point(wanted, self._blobs.has)
                if outcome is not None:
                    return outcome
                # Nothing named these bytes yet, and they were collected meanwhile.
        raise Refusal(Reason.STORE_UNAVAILABLE, "the adapter was collected while it was registered")

    def admit(
        self,
        source: Path | Directory,
        base: BaseInfo,
        limits: AdapterLimits | None = None,
        expected_digest: str = "",
    ) -> str:
        """Checks and copies the adapter in `source`, under no name yet; returns its digest.

        What is not registered then is collected after the grace. Raises Refusal as `register`
        does.
        """
        if expected_digest:
            digest_hex(expected_digest)
        with (
            nullcontext(source) if isinstance(source, Directory) else open_directory(source) as src
        ):
            return self._admit(src, base, limits or AdapterLimits(), expected_digest).digest

    def _admit(
        self, source: Directory, base: BaseInfo, limits: AdapterLimits, expected_digest: str
    ) -> AdapterSpec:
        with self._blobs.staged(source, limits.max_weights_bytes) as copy:
            spec = inspect(copy, base, limits)
            if expected_digest not in ("", spec.digest):
                message = f"the bytes are {spec.digest}, not {expected_digest}"
                raise Refusal(Reason.ADAPTER_INVALID, message, "digest")
            self._blobs.publish(copy, spec.digest)
        return spec

    def resolve(self, adapter_id: str) -> Record:
        """The record that an id means now.

        Raises Refusal: FIELD_INVALID (not of that form), ADAPTER_NOT_FOUND.
        """
        return self._index.find(parse_id(adapter_id))

    def get(self, name: str, version: int | None = None) -> Record:
        """The current, or the given, version of `name`; raises as `resolve` does."""
        return self._index.find(AdapterId(check_name(name), version))

    def page(
        self, page_size: int = 0, page_token: str = "", labels: Mapping[str, str] | None = None
    ) -> Page:
        """Current versions in the order of names: `Page(records, next_page_token)`.

        Only those that carry all of `labels`. `page_size` 0 is 100; more than 1000 is 1000. Raises
        Refusal(FIELD_INVALID).
        """
        checked = check_labels(labels or {})
        if page_size < 0:
            raise Refusal(Reason.FIELD_INVALID, "page_size is negative", "page_size")
        if page_token:
            try:
                check_name(page_token)
            except Refusal:
                message = "page_token is none that this server gave"
                raise Refusal(Reason.FIELD_INVALID, message, "page_token") from None
        return self._index.page(page_token, min(page_size or DEFAULT_PAGE, MAX_PAGE), checked)

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
        """Grows with every change of names, aliases and labels, by any process; cheap to ask."""
        return self._index.change_counter()

    def versions(self, name: str) -> tuple[Record, ...]:
        """All versions of a name, newest first; raises Refusal as `get` does."""
        return self._index.versions(check_name(name))

    def label(
        self, adapter_id: str, labels: Mapping[str, str], remove: Collection[str] = ()
    ) -> Record:
        """Puts labels on a version, after taking others off; returns the record as it is then.

        Raises Refusal: FIELD_INVALID (id, labels, too many of them), ADAPTER_NOT_FOUND.
        """
        check_keys(remove)
        return self._index.label(parse_id(adapter_id), check_labels(labels), remove)

    def set_alias(self, alias: str, adapter_id: str, expected: str | None = None) -> Alias:
        """Points `alias` to the version that `adapter_id` means now, making or moving it.

        With `expected` only if it points there until now: an id, or "" for an alias that must not
        exist yet. Raises Refusal: FIELD_INVALID; ADAPTER_NOT_FOUND (`adapter_id`);
        ADAPTER_CONFLICT (it points elsewhere, or is an adapter's name).
        """
        check_name(alias)
        before = parse_id(expected) if expected else expected
        return self._aliases.set(alias, parse_id(adapter_id), before)

    def delete_alias(self, alias: str) -> None:
        """Forgets an alias. Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND."""
        self._aliases.delete(check_name(alias))

    def aliases(self) -> tuple[Alias, ...]:
        """Every alias, in order; those of deleted adapters lead nowhere until they are restored."""
        return self._aliases.all()

    def delete(self, name: str) -> None:
        """Deletes a name and its versions: nobody finds them, until `restore` or for good.

        Their bytes stay until `gc`; the name's version numbers are never used again. Raises
        Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND.
        """
        self._index.delete(check_name(name))

    def restore(self, name: str) -> Record:
        """Takes back the last deletion of a name; returns its current version.

        Raises Refusal: FIELD_INVALID, ADAPTER_NOT_FOUND (nothing is left of it),
        ADAPTER_CONFLICT (the name has been given to an adapter or an alias since).
        """
        return self._index.restore(check_name(name))

    def deleted(self) -> tuple[Record, ...]:
        """The deleted versions that have not been collected, in order."""
        return self._index.deleted()

    def gc(
        self,
        grace_seconds: float = GRACE_SECONDS,
        keep: Collection[str] = (),
        dry_run: bool = False,
    ) -> Collected:
        """Removes deleted versions, and bytes that no version names, older than the grace.

        The bytes of the digests in `keep` stay: those that this server uses. Other servers' are
        kept by the grace, which should be longer than any of their requests. Expired uploads go
        too. With `dry_run` nothing is changed.
        """
        return garbage.collect(
            self._database, self._blobs, self._uploads, grace_seconds, keep, dry_run
        )

    def begin_upload(self, name: str = "") -> str:
        """Opens an upload; returns its id.

        A `name` is checked now and not kept: it saves sending what `finish_upload` would refuse.
        Raises Refusal: FIELD_INVALID (name), OVERLOADED (too many are open).
        """
        if name:
            check_name(name)
        return self._uploads.begin()

    def append(self, upload_id: str, file: str, offset: int, data: bytes | memoryview) -> int:
        """Adds bytes to "adapter_config.json" or "adapter_model.safetensors"; its size then.

        `offset` must be the size until now, so that a piece sent twice does no harm. Raises
        Refusal: UPLOAD_NOT_FOUND, UPLOAD_OFFSET (`upload` has the right one), FIELD_INVALID
        (file), ADAPTER_TOO_LARGE.
        """
        return self._uploads.append(upload_id, file, offset, data)

    def upload(self, upload_id: str) -> Upload:
        """How far an upload has come. Raises Refusal(UPLOAD_NOT_FOUND)."""
        return self._uploads.state(upload_id)

    def open_upload(self, upload_id: str) -> AbstractContextManager[Directory]:
        """The files of an upload, to look at; nothing is added to them meanwhile.

        Raises Refusal(UPLOAD_NOT_FOUND).
        """
        return self._uploads.reading(upload_id)

    def finish_upload(
        self,
        upload_id: str,
        name: str,
        expected_digest: str,
        base: BaseInfo,
        limits: AdapterLimits | None = None,
        replace: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[Record, bool]:
        """Registers what was uploaded, if its digest is the expected one ("": any), and ends it.

        A refused upload stays, to be finished otherwise or aborted. Raises Refusal:
        UPLOAD_NOT_FOUND, FIELD_INVALID (digest), and as `register` does.
        """
        with self._uploads.reading(upload_id, remove=True) as source:
            return self.register(
                name, source, base, limits, replace, labels, expected_digest=expected_digest
            )

    def abort_upload(self, upload_id: str) -> None:
        """Drops an upload. Raises Refusal(UPLOAD_NOT_FOUND)."""
        self._uploads.abort(upload_id)

    def path(self, digest: str) -> Path:
        """The directory of the adapter with this digest: what `AdapterRef.path` carries.

        Raises Refusal: FIELD_INVALID (no digest), ADAPTER_NOT_FOUND.
        """
        return self._blobs.path(digest)

    def verify(self, digest: str) -> None:
        """Reads an adapter's bytes again.

        Raises Refusal: ADAPTER_CORRUPT (they have changed), FIELD_INVALID, ADAPTER_NOT_FOUND.
        """
        self._blobs.verify(digest)

    def verify_all(self) -> Iterator[Verified]:
        """Reads the bytes of every version again, deleted ones too, in the order of digests."""
        for digest, versions in self._index.users().items():
            error = None
            try:
                self._blobs.verify(digest)
            except Refusal as found:
                error = found
            yield Verified(digest, versions, error)

    def close(self) -> None:
        """Closes the index and gives up the staging area. Idempotent."""
        self._database.close()
        self._blobs.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
