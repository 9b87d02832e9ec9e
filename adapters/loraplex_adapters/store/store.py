"""The adapters a server knows: content by digest, and names with immutable versions."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import TracebackType

from loraplex_adapters.errors import AdapterError
from loraplex_adapters.files import Directory, open_directory
from loraplex_adapters.format import inspect, survey
from loraplex_adapters.spec import BaseShapes, Limits
from loraplex_adapters.store.blobs import Blobs, locked
from loraplex_adapters.store.ids import AdapterId, check_name, parse_id
from loraplex_adapters.store.index import Index, Page, Record

DEFAULT_PAGE = 100
MAX_PAGE = 1000


class Store:
    """Adapters on disk. Safe to use from several threads and processes at once.

    Every method blocks (call it in a worker thread) and may raise `AdapterError` with reason
    STORE_FULL or STORE_UNAVAILABLE when the disk does not do its part.
    """

    def __init__(self, root: Path) -> None:
        """Opens the store below `root`, making it if there is none, and clears what crashes left.

        Raises AdapterError(STORE_UNAVAILABLE) when `root` cannot be written or its index not read.
        """
        with locked(root):
            self._blobs = Blobs(root)
            try:
                self._index = Index(root / "index.sqlite3")
            except BaseException:
                self._blobs.close()
                raise

    def register(
        self,
        name: str,
        source: Path | Directory,
        base: BaseShapes,
        limits: Limits | None = None,
        replace: bool = False,
    ) -> tuple[Record, bool]:
        """Checks and copies the adapter in `source` and points `name` to it, as a new version.

        Returns the record and whether it is new: False when `name` already points to these bytes.
        What is checked in the end is the copy, so nobody can change the files in between. When this
        returns, the adapter survives a power cut.
        Raises AdapterError: FIELD_INVALID (name), ADAPTER_CONFLICT (the name holds other bytes and
        `replace` is not set), and whatever `format.inspect` finds.
        """
        check_name(name)
        limits = limits or Limits()
        with (
            nullcontext(source) if isinstance(source, Directory) else open_directory(source) as src
        ):
            hopeless = survey(src, base, limits).findings  # before gigabytes are copied
            if hopeless:
                raise AdapterError.of(hopeless)
            with self._blobs.staged(src, limits.max_weights_bytes) as copy:
                spec = inspect(copy, base, limits)
                self._blobs.publish(copy, spec.digest)
        return self._index.point(name, spec, replace)

    def resolve(self, adapter_id: str) -> Record:
        """The record of "name" (its current version), "name@3" or "name@sha256:<hex>".

        Raises AdapterError: FIELD_INVALID (not of that form), ADAPTER_NOT_FOUND.
        """
        return self._index.find(parse_id(adapter_id))

    def get(self, name: str, version: int | None = None) -> Record:
        """The current, or the given, version of `name`; raises as `resolve` does."""
        return self._index.find(AdapterId(check_name(name), version))

    def list(self, page_size: int = 0, page_token: str = "") -> Page:
        """Current versions in the order of names: `Page(records, next_page_token)`.

        `page_size` 0 is 100; more than 1000 is 1000. Raises AdapterError(FIELD_INVALID).
        """
        if page_size < 0:
            raise AdapterError("FIELD_INVALID", "page_size is negative", "page_size")
        if page_token:
            try:
                check_name(page_token)
            except AdapterError:
                message = "page_token is none that this server gave"
                raise AdapterError("FIELD_INVALID", message, "page_token") from None
        return self._index.page(page_token, min(page_size or DEFAULT_PAGE, MAX_PAGE))

    def delete(self, name: str) -> None:
        """Forgets the name and its versions; blobs stay. The name's version numbers are not reused.

        Raises AdapterError: FIELD_INVALID, ADAPTER_NOT_FOUND.
        """
        self._index.forget(check_name(name))

    def path(self, digest: str) -> Path:
        """The directory of the adapter with this digest: what `AdapterRef.path` carries.

        Raises AdapterError: FIELD_INVALID (no digest), ADAPTER_NOT_FOUND.
        """
        return self._blobs.path(digest)

    def verify(self, digest: str) -> None:
        """Reads an adapter's bytes again.

        Raises AdapterError: ADAPTER_CORRUPT (they have changed), FIELD_INVALID, ADAPTER_NOT_FOUND.
        """
        self._blobs.verify(digest)

    def close(self) -> None:
        """Closes the index and gives up the staging area. Idempotent."""
        self._index.close()
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
