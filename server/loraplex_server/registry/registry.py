"""Registration and look-up of adapters, from the event loop over the blocking store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from loraplex_adapters.format.examine import Report, examine
from loraplex_adapters.format.files import open_below
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.store import Allotment, LabelSelector, Record, Store
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason, Refusal
from loraplex_model.checkpoints.chat import ChatTemplate

from loraplex_server.access.principals import Principal
from loraplex_server.access.rules import import_folder, require_name
from loraplex_server.engine.group.face import Engine
from loraplex_server.engine.messages import AdapterRef, files_digest, held_by
from loraplex_server.metrics import Metrics
from loraplex_server.registry import servable
from loraplex_server.registry.catalogue import Catalogue, read_catalogue
from loraplex_server.registry.census import Census
from loraplex_server.registry.feed import AdapterFeed
from loraplex_server.registry.freshness import unanswered
from loraplex_server.registry.names import AdapterNames
from loraplex_server.registry.signatures import Signatures
from loraplex_server.registry.sources import ImportedFolder, Source
from loraplex_server.registry.terms import Registered, RegistrationTerms, usable
from loraplex_server.registry.texts import AdapterTexts
from loraplex_server.runtime.finishing import to_the_end
from loraplex_server.runtime.lanes import Lane, Lanes
from loraplex_server.telemetry.states import watch_names

P = ParamSpec("P")
T = TypeVar("T")

READ_SECONDS: Final = 3.0
"""Seconds that one reading of the index may take; then the index counts as away."""

CATALOGUE_SECONDS: Final = 30.0
"""Seconds that reading all names may take."""


class Registry:
    """Registers adapters, changes their names, and resolves adapter ids.

    A method that is given a principal does what is allowed to that: versions that it does not see
    do not exist for the method (ADAPTER_NOT_FOUND).

    Calls that only read the store, or only move an adapter within the engine, use `store` or
    `engine` directly. Every method may raise `Refusal`, and none blocks the event loop: files and
    index are accessed in the threads of `lanes`. While the index is away, adapters whose names are
    known are still resolved; other calls that need it are refused with STORE_UNAVAILABLE.

    Attributes:
        data_bytes: returns the bytes of a principal's files of examples for training.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        metrics: Metrics,
        import_root: Path,
        limits: AdapterLimits,
        lanes: Lanes | None = None,
        texts: AdapterTexts | None = None,
        signatures: Signatures | None = None,
    ) -> None:
        self.lanes = lanes or Lanes()
        self.store = store
        self.engine = engine
        self._metrics = metrics
        self._import_root = import_root
        self._limits = limits
        count_changes = partial(self.lanes.count.run, store.change_counter)
        self._names = AdapterNames(count_changes, self._look_up)
        watch_names(metrics, self._names)
        self.data_bytes: Callable[[str], int] = lambda principal: 0
        self._texts = texts or AdapterTexts()
        self.signatures = signatures or Signatures()
        self.feed = AdapterFeed(self._catalogue, count_changes)
        self.census = Census(partial(self.lanes.survey.run, store.survey), self._base, metrics)

    async def open(self) -> None:
        """Reads the registered names. To be called once, before serving."""
        catalogue = await self._catalogue()
        for name in catalogue.names:
            self._metrics.adapter_registered(name)
        known = {**catalogue.names, **catalogue.aliases}
        self._names.fill(
            {name: self._registered(record) for name, record in known.items()}, catalogue.count
        )
        await self.census.count()

    async def close(self) -> None:
        """Ends the background work. Idempotent."""
        await self._names.freshness.close()

    async def resolve(self, adapter_id: str, principal: Principal) -> Registered:
        """The version that an adapter id or an alias names now, even one that may not be served.

        Changes made by other processes are seen within half a second while the index answers.
        """
        adapter = await self._names.resolve(adapter_id, principal.seen)
        self._metrics.adapter_registered(adapter.record.name)
        return adapter.held_by(principal.copies)

    async def servable(self, adapter_id: str, principal: Principal) -> Registered:
        """The version that an adapter id or an alias names now, for a call that uses it.

        Raises Refusal if the version may not be served: ADAPTER_QUARANTINED, BASE_MODEL_MISMATCH.
        """
        return usable(await self.resolve(adapter_id, principal))

    async def _look_up(self, adapter_id: str, seen: LabelSelector, known: bool) -> Registered:
        def work() -> Registered:
            return self._registered(self.store.resolve(adapter_id, seen))

        # A flood of unknown names must not delay those that are only looked up again.
        return await self._reading(self.lanes.known if known else self.lanes.index, work)

    async def read(self, work: Callable[..., T], *args: object) -> T:
        """Runs a reading of the store's index, such as a list, in a thread."""
        await self._names.freshness.require()
        try:
            return await self._reading(self.lanes.index, partial(work, *args))
        except Refusal as refusal:
            if refusal.reason is Reason.STORE_UNAVAILABLE:
                self._names.freshness.lost()
            raise

    async def _reading(self, lane: Lane, work: Callable[[], T], seconds: float = READ_SECONDS) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await lane.run(work)
        except TimeoutError:
            raise unanswered() from None

    async def template(self, records: Sequence[Record]) -> ChatTemplate | None:
        """The chat template of a request with these adapters; None for the base model's."""
        read = partial(self.read, self.store.chat_template)
        return await self._texts.template(records, read, self.lanes.text)

    # examination of files

    @property
    def max_weights_bytes(self) -> int:
        """Size of the largest weights file that is accepted."""
        return self._limits.max_weights_bytes

    def imported(self, path: str, principal: Principal) -> ImportedFolder:
        """Source of the directory `path` below the principal's part of the import root.

        Opening it checks the path. Raises Refusal(PERMISSION_DENIED).
        """
        root = import_folder(principal, self._import_root)
        return ImportedFolder(partial(open_below, root, path))

    async def examine(self, source: Source) -> Report:
        """Reports all faults of an adapter's files; changes nothing."""

        def work() -> Report:
            with source() as opened:
                return examine(opened, self._base(), self._limits)

        return await self.lanes.validations.run(work)

    # registration: each returns the adapter and whether the version is new

    async def register(
        self, source: Source, terms: RegistrationTerms, lane: Lane | None = None
    ) -> tuple[Registered, bool]:
        """Checks, copies and registers a directory, in a thread of `lane` if it is given."""

        def record() -> tuple[Record, bool]:
            with source() as opened:
                return self.store.register(
                    terms.name,
                    opened,
                    self._base(),
                    self._limits,
                    terms.replace,
                    labels=terms.labels or {},
                    text=terms.text,
                    seen=terms.seen,
                    allotment=terms.allotment,
                    approve=self.signatures.approval(terms),
                )

        return await self._name(terms, source, record, lane or self.lanes.registrations)

    async def finish_upload(
        self, upload_id: str, terms: RegistrationTerms, owner: str | None
    ) -> tuple[Registered, bool]:
        """Checks and registers an upload that `owner` began; None stands for anybody."""

        def record() -> tuple[Record, bool]:
            return self.store.finish_upload(
                upload_id,
                terms.name,
                terms.expected_digest,
                self._base(),
                self._limits,
                terms.replace,
                terms.labels or {},
                text=terms.text,
                seen=terms.seen,
                owner=owner,
                allotment=terms.allotment,
                approve=self.signatures.approval(terms),
            )

        source = partial(self.store.uploads.reading, upload_id, owner)
        return await self._name(terms, source, record, self.lanes.registrations)

    async def _name(
        self,
        terms: RegistrationTerms,
        source: Source,
        record: Callable[[], tuple[Record, bool]],
        lane: Lane,
    ) -> tuple[Registered, bool]:
        """Runs `record`, and loads the adapter if the terms say so.

        A replacement is loaded first: its files are copied into the store without a name.
        """
        await self._names.freshness.require()
        if terms.allotment is not None:  # before gigabytes are copied
            allowed, labels = self.store.allotments.require, terms.labels or {}
            await self.read(allowed, terms.allotment, terms.name, labels)
        await lane.run(partial(self._texts.check, terms.text))
        if terms.load and terms.replace:

            def admit() -> AdapterRef:
                with source() as opened:
                    approve = self.signatures.approval(terms)
                    known = (terms.expected_digest, approve)
                    digest = self.store.admit(opened, self._base(), self._limits, *known)
                held = self.store.quarantined().get(digest)
                if held is not None:
                    raise Refusal.of([servable.held_back(terms.name, held)])
                path = str(self.store.path(digest))
                return AdapterRef(held_by(terms.copies, digest), path)

            await self.engine.load(await lane.run(admit))

        def work() -> tuple[Registered, bool]:
            found, created = record()
            return self._registered(found), created

        adapter, created = await self._change(lane, terms.name, work)
        self._names.keep(terms.name, adapter)
        self._metrics.adapter_registered(terms.name)
        if terms.load:
            await self.engine.load(usable(adapter).held_by(terms.copies).ref)
        return adapter, created

    # changes of names, labels and aliases

    async def label(
        self,
        adapter_id: str,
        labels: Mapping[str, str],
        remove: Collection[str],
        principal: Principal,
    ) -> Record:
        """Removes labels from a version, then adds others.

        Raises Refusal(PERMISSION_DENIED) if its name is not one that the principal may change.
        """
        known = (await self.resolve(adapter_id, principal)).record
        require_name(principal, known.name)
        change = partial(self.store.label, known.id, labels, remove, principal.seen)

        def work() -> Registered:
            return self._registered(change())

        adapter = await self._change(self.lanes.changes, "", work)
        self._names.relabelled(adapter)
        return adapter.record

    async def set_alias(
        self, alias: str, adapter_id: str, expected: str | None, seen: LabelSelector
    ) -> Record:
        """Points an alias to a version in `seen`.

        `expected` is the adapter id that the alias must point to now, "" if it must not exist, None
        for any. Raises Refusal(ADAPTER_CONFLICT) if it points elsewhere.
        """

        def work() -> Record:
            self.signatures.require_alias(alias, lambda: self.store.resolve(adapter_id, seen).name)
            pointed = self.store.set_alias(alias, adapter_id, expected, seen)
            return self.store.get(pointed.name, pointed.version)

        return await self._move(alias, work)

    async def delete_alias(self, alias: str, seen: LabelSelector) -> None:
        """Deletes an alias of a version in `seen`. The adapter that it pointed to stays."""
        work = partial(self.store.delete_alias, alias, seen)
        await self._change(self.lanes.changes, alias, work)

    async def delete(self, name: str, seen: LabelSelector) -> None:
        """Deletes a name and its metrics. Running requests that use it finish."""
        await self._change(self.lanes.changes, name, partial(self.store.delete, name, seen))
        self._metrics.adapter_deleted(name)

    async def restore(
        self, name: str, seen: LabelSelector, allotment: Allotment | None = None
    ) -> Record:
        """Restores a deleted name."""
        record = await self._move(name, partial(self.store.restore, name, seen, allotment))
        self._metrics.adapter_registered(name)
        return record

    async def change(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a change of the store that moves no name.

        The change runs to its end even if the caller is cancelled.
        """
        return await self._change(self.lanes.changes, "", partial(work, *args, **kwargs))

    async def _move(self, name: str, work: Callable[[], Record]) -> Record:
        """Runs a change after which `name` means the version that `work` returns."""

        def moving() -> tuple[Record, Registered | None]:
            record = work()
            try:
                return record, self._registered(record)
            except Refusal:  # its files are missing; the change was made all the same
                return record, None

        record, adapter = await self._change(self.lanes.changes, name, moving)
        if adapter is not None:
            self._names.keep(name, adapter)
        return record

    async def _change(self, lane: Lane, moved: str, work: Callable[[], T]) -> T:
        """Runs a change, after which the name or alias `moved` may mean something else."""
        await self._names.freshness.require()

        async def run() -> T:
            try:
                done = await lane.run(work)
                self._names.forget(moved)
                return done
            finally:
                self._names.clear()
                self.feed.changed()

        return await to_the_end(run())

    # the engine

    async def unload(
        self, ref: AdapterRef, force: bool, drain: float | None, everywhere: bool
    ) -> None:
        """Removes an adapter from the device, after the requests that use it or, by force, at once.

        Requests that still run after `drain` seconds (None: no limit) are aborted. With
        `everywhere`, callers' own copies of its files are removed too.
        """
        deadline = None if drain is None else time.monotonic() + drain
        digests = {ref.digest: None}
        if everywhere:
            files = files_digest(ref.digest)
            digests |= {d: None for d in self.engine.adapters if files_digest(d) == files}
        try:
            for digest in digests:
                await self.engine.unload(digest, force, deadline)
        except Refusal:
            self._metrics.adapter_unloaded("error")
            raise
        self._metrics.adapter_unloaded("ok")

    def _base(self) -> BaseInfo:
        model = self.engine.hello.model
        return model.base.named(model.name)

    # the store

    def _registered(self, record: Record) -> Registered:
        # Whether the files exist is checked when the adapter is loaded, not here: a fault of one
        # adapter must not keep the names of others from being read.
        path = str(self.store.directory(record.digest))
        return Registered(record, path, self.obstacle(record))

    def obstacle(self, record: Record) -> Problem | None:
        """The reason why calls may not use a version; None if they may."""
        return servable.obstacle(record, self._base())

    async def _catalogue(self) -> Catalogue:
        work = partial(read_catalogue, self.store)
        return await self._reading(self.lanes.index, work, CATALOGUE_SECONDS)
