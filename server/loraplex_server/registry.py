"""The adapters as the front sees them: the store behind worker threads, and what is resident."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from loraplex_adapters.files import open_below
from loraplex_adapters.spec import BaseShapes, Limits
from loraplex_adapters.store import Page, Record, Store

from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.messages import AdapterRef, AdapterStatus
from loraplex_server.metrics import Metrics


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


class Registry:
    """Registers, finds and forgets adapters, and moves them on and off the device.

    Every method may raise `AdapterError`; `load` and `unload` also `EngineFailure`. Nothing here
    blocks the event loop: files and the index are touched in worker threads only.
    """

    def __init__(
        self,
        store: Store,
        engine: EngineClient,
        metrics: Metrics,
        import_root: Path,
        limits: Limits,
    ) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._import_root = import_root
        self._limits = limits

    async def open(self) -> None:
        """Counts what is registered; call once before serving."""
        token = ""
        while True:
            page = await self.list(1000, token)
            for record in page.records:
                self._metrics.adapter_registered(record.name)
            token = page.next_page_token
            if not token:
                return

    async def register(self, name: str, path: str, replace: bool) -> tuple[Registered, bool]:
        """Checks and copies the directory `path` below the import root; whether it is new."""
        base = BaseShapes.of(self._engine.hello.model)

        def work() -> tuple[Registered, bool]:
            with open_below(self._import_root, path) as source:
                record, new = self._store.register(name, source, base, self._limits, replace)
            return Registered(record, str(self._store.path(record.digest))), new

        adapter, created = await asyncio.to_thread(work)
        self._metrics.adapter_registered(name)
        return adapter, created

    async def resolve(self, adapter_id: str) -> Registered:
        """The version that an adapter id names now."""

        def work() -> Registered:
            record = self._store.resolve(adapter_id)
            return Registered(record, str(self._store.path(record.digest)))

        adapter = await asyncio.to_thread(work)
        self._metrics.adapter_registered(adapter.record.name)
        return adapter

    async def list(self, page_size: int, page_token: str) -> Page:
        """A page of current versions in the order of names."""
        return await asyncio.to_thread(self._store.list, page_size, page_token)

    async def delete(self, name: str) -> None:
        """Forgets a name and its metrics. Requests that run with it finish."""
        await asyncio.to_thread(self._store.delete, name)
        self._metrics.adapter_deleted(name)

    async def load(self, adapter: Registered) -> None:
        """Makes it resident; returns when it is."""
        await self._engine.load(adapter.reference())

    async def unload(self, adapter: Registered, force: bool) -> None:
        """Takes it off the device, after the requests that use it or, by force, at once."""
        await self._engine.unload(adapter.digest, force)

    def residency(self, digest: str) -> AdapterStatus | None:
        """Where it is on the device; None when it is not."""
        return self._engine.adapters.get(digest)
