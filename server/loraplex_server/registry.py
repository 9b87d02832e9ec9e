"""The adapters as the front sees them: the store behind worker threads, and where each one is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from loraplex_adapters.format.examine import Report, examine
from loraplex_adapters.format.files import Directory, open_below, open_directory
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Page, Record, Store, Upload
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.messages import AdapterRef, AdapterStatus
from loraplex_server.engine.process.client import EngineClient
from loraplex_server.feed import AdapterFeed, Catalogue
from loraplex_server.metrics import Metrics
from loraplex_server.name_cache import NameCache

_PAGE = 1000

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registered:
    """A version of an adapter and the directory that holds its bytes."""

    record: Record
    path: str

    @property
    def digest(self) -> str:
        """Its identity."""
        return self.record.digest

    def reference(self) -> AdapterRef:
        """What the engine is told of it."""
        return AdapterRef(self.record.digest, self.path)


@dataclass(frozen=True, slots=True)
class Terms:
    """Under which name bytes are registered, and how.

    With `load` a name that is replaced moves only once its new bytes are on the device, so that
    nobody who calls it waits for them; if they cannot be loaded, it does not move.
    """

    name: str
    replace: bool = False
    labels: Mapping[str, str] | None = None
    expected_digest: str = ""
    load: bool = False


class Registry:
    """Registers, finds and forgets adapters, and moves them between the store and the device.

    Every method may raise `Refusal`; those that move adapters also `Refusal`. Nothing
    here blocks the event loop: files and the index are touched in worker threads only.
    """

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        metrics: Metrics,
        import_root: Path,
        limits: AdapterLimits,
    ) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._import_root = import_root
        self._limits = limits
        self._names: NameCache[Registered] = NameCache(self._count_changes)
        # One look-up at a time: a burst of them must not take the cores from the engine's pass.
        self._looking = asyncio.Semaphore(1)
        self.feed = AdapterFeed(self._catalogue, self._count_changes)

    async def open(self) -> None:
        """Learns what is registered; call once before serving."""
        catalogue = await self._catalogue()
        for name in catalogue.names:
            self._metrics.adapter_registered(name)
        known = {**catalogue.names, **catalogue.aliases}
        self._names.fill(
            {name: self._registered(record) for name, record in known.items()}, catalogue.count
        )

    # what there is

    async def resolve(self, adapter_id: str) -> Registered:
        """The version that an adapter id or an alias names now.

        What another process has changed is seen within half a second.
        """

        def work() -> Registered:
            return self._registered(self._store.resolve(adapter_id))

        async def look_up() -> Registered:
            async with self._looking:
                return await asyncio.to_thread(work)

        adapter = await self._names.get(adapter_id, look_up)
        self._metrics.adapter_registered(adapter.record.name)
        return adapter

    async def list(self, page_size: int, page_token: str, labels: Mapping[str, str]) -> Page:
        """A page of current versions that have these labels, in the order of names."""
        return await asyncio.to_thread(self._store.list, page_size, page_token, labels=labels)

    async def versions(self, name: str) -> Sequence[Record]:
        """All versions of a name, the newest first."""
        return await asyncio.to_thread(self._store.versions, name)

    async def examine(self, path: str) -> Report:
        """What is wrong with the directory `path` below the import root; changes nothing."""

        def work() -> Report:
            with open_below(self._import_root, path) as source:
                return examine(source, self._base(), self._limits)

        return await asyncio.to_thread(work)

    # changes of names

    async def register(self, path: str, terms: Terms) -> tuple[Registered, bool]:
        """Checks and copies the directory `path` below the import root; whether it is new."""
        return await self._register(lambda: open_below(self._import_root, path), terms)

    async def register_trained(self, folder: Path, terms: Terms) -> tuple[Registered, bool]:
        """Checks and copies a directory that this server's own trainer made; whether it is new."""
        return await self._register(lambda: open_directory(folder), terms)

    async def label(
        self, adapter_id: str, change: Mapping[str, str], remove: Sequence[str]
    ) -> Record:
        """Sets and removes labels of a version."""
        return await self._change(self._store.label, adapter_id, change, remove)

    async def set_alias(self, alias: str, adapter_id: str, expected: str | None) -> Record:
        """Points an alias; `expected` is where it must point now ("": nowhere), None is anywhere.

        Raises Refusal(ADAPTER_CONFLICT) when it points elsewhere.
        """

        def work() -> Record:
            pointed = self._store.set_alias(alias, adapter_id, expected)
            return self._store.get(pointed.name, pointed.version)

        return await self._change(work)

    async def delete_alias(self, alias: str) -> None:
        """Removes an alias."""
        await self._change(self._store.delete_alias, alias)

    async def delete(self, name: str) -> None:
        """Forgets a name and its metrics. Requests that run with it finish."""
        await self._change(self._store.delete, name)
        self._metrics.adapter_deleted(name)

    async def restore(self, name: str) -> Record:
        """Brings a deleted name back."""
        record = await self._change(self._store.restore, name)
        self._metrics.adapter_registered(name)
        return record

    # uploads

    async def start_upload(self) -> str:
        """The id of a new upload."""
        return await asyncio.to_thread(self._store.begin_upload)

    async def append(self, upload_id: str, file: str, offset: int, data: bytes) -> int:
        """Adds bytes to one of its files; the file's size then. They survive this process."""
        return await asyncio.to_thread(self._store.append, upload_id, file, offset, data)

    async def uploaded(self, upload_id: str) -> Upload:
        """How much of it is there."""
        return await asyncio.to_thread(self._store.upload, upload_id)

    async def abort_upload(self, upload_id: str) -> None:
        """Drops an upload."""
        await asyncio.to_thread(self._store.abort_upload, upload_id)

    async def finish_upload(self, upload_id: str, terms: Terms) -> tuple[Registered, bool]:
        """Registers what was uploaded; whether it is new."""

        def admit() -> str:
            with self._store.open_upload(upload_id) as source:
                return self._store.admit(source, self._base(), self._limits, terms.expected_digest)

        def work() -> tuple[Registered, bool]:
            record, new = self._store.finish_upload(
                upload_id,
                terms.name,
                terms.expected_digest,
                self._base(),
                self._limits,
                terms.replace,
                terms.labels or {},
            )
            return self._registered(record), new

        return await self._name(terms, admit, work)

    async def examine_upload(self, upload_id: str) -> Report:
        """What is wrong with what was uploaded; changes nothing."""

        def work() -> Report:
            with self._store.open_upload(upload_id) as source:
                return examine(source, self._base(), self._limits)

        return await asyncio.to_thread(work)

    @property
    def max_weights_bytes(self) -> int:
        """The largest weights file that is taken."""
        return self._limits.max_weights_bytes

    # where it is

    async def load(self, adapter: Registered) -> None:
        """Makes it resident; returns when it is."""
        await self._engine.load(adapter.reference())

    async def unload(self, adapter: Registered, force: bool, drain: float | None = None) -> None:
        """Takes it off the device, after the requests that use it or, by force, at once.

        Those that still run after `drain` seconds (None: any time) are aborted.
        """
        deadline = None if drain is None else time.monotonic() + drain
        try:
            await self._engine.unload(adapter.digest, force, deadline)
        except Refusal:
            self._metrics.adapter_unloaded("error")
            raise
        self._metrics.adapter_unloaded("ok")

    async def pin(self, adapter: Registered, pinned: bool) -> None:
        """Makes it resident and keeps it so, or lets it be evicted again."""
        await self._engine.pin(adapter.reference(), pinned)

    async def merge(self, adapter: Registered) -> None:
        """Gives it dense copies; returns when its requests use them."""
        await self._engine.merge(adapter.reference())

    async def unmerge(self, adapter: Registered) -> None:
        """Drops its dense copies."""
        await self._engine.unmerge(adapter.digest)

    def residency(self, digest: str) -> AdapterStatus | None:
        """Where it is in the engine; None when it is in the store only."""
        return self._engine.adapters.get(digest)

    # the store

    def _base(self) -> BaseInfo:
        return self._engine.hello.model.base

    def _registered(self, record: Record) -> Registered:
        return Registered(record, str(self._store.path(record.digest)))

    async def _register(
        self, opened: Callable[[], Directory], terms: Terms
    ) -> tuple[Registered, bool]:
        def admit() -> str:
            with opened() as source:
                return self._store.admit(source, self._base(), self._limits)

        def work() -> tuple[Registered, bool]:
            with opened() as source:
                record, new = self._store.register(
                    terms.name,
                    source,
                    self._base(),
                    self._limits,
                    terms.replace,
                    labels=terms.labels or {},
                )
            return self._registered(record), new

        return await self._name(terms, admit, work)

    async def _name(
        self,
        terms: Terms,
        admit: Callable[[], str],
        register: Callable[[], tuple[Registered, bool]],
    ) -> tuple[Registered, bool]:
        """Registers bytes, and makes them resident if the terms say so.

        `admit` brings the same bytes into the store under no name.
        """
        if terms.load and terms.replace:
            digest = await asyncio.to_thread(admit)
            await self._engine.load(AdapterRef(digest, str(self._store.path(digest))))
        adapter, created = await self._change(register)
        self._metrics.adapter_registered(terms.name)
        if terms.load:
            await self.load(adapter)
        return adapter, created

    async def _change(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `work` in a thread and forgets what was known, even if nobody waits any more."""

        async def run() -> T:
            try:
                return await asyncio.to_thread(work, *args, **kwargs)
            finally:
                self._names.clear()
                self.feed.changed()

        return await asyncio.shield(asyncio.create_task(run()))

    async def _count_changes(self) -> int:
        return await asyncio.to_thread(self._store.change_counter)

    async def _catalogue(self) -> Catalogue:
        def work() -> Catalogue:
            # The count comes first: a change during the reading is then seen the next time.
            count = self._store.change_counter()
            names: dict[str, Record] = {}
            token = ""
            while True:
                page = self._store.list(_PAGE, token)
                names |= {record.name: record for record in page.records}
                token = page.next_page_token
                if not token:
                    return Catalogue(names, dict(self._pointed(names)), count)

        return await asyncio.to_thread(work)

    def _pointed(self, names: Mapping[str, Record]) -> Iterator[tuple[str, Record]]:
        """Every alias and its version, but for those whose version is deleted."""
        for alias in self._store.aliases():
            record = names.get(alias.name)
            if record is None or record.version != alias.version:
                try:
                    record = self._store.get(alias.name, alias.version)
                except Refusal as error:
                    if error.reason is not Reason.ADAPTER_NOT_FOUND:
                        raise
                    continue
            yield alias.alias, record
