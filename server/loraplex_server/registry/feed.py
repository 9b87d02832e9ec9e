"""The feed of adapter changes: names, aliases, labels, and where each adapter is.

Changes are the differences between two readings of the store's catalogue and between two tables of
the engine. The catalogue is read at once after a change by this process and once a second for
changes by others; the engine's table comes with its steps. Without watchers nothing is read.

A watcher is shown the differences of what exists for it: an adapter whose labels change so that it
is not seen any more is deleted for the watcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from loraplex_adapters.store import Record
from loraplex_model.base.refusal import Refusal

from loraplex_server.engine.messages import AdapterStatus, files_digest, holder_of
from loraplex_server.registry.catalogue import Catalogue
from loraplex_server.registry.view import AdapterRow, View
from loraplex_server.runtime.watched import WatchedTask

POLL_SECONDS: Final = 1.0
BACKLOG: Final = 1024
"""Most changes that may wait for one watcher; beyond it the watcher gets the whole table again."""

ON_DEVICE: Final = frozenset({"resident", "draining"})
"""States of an adapter that is on the device."""

log = logging.getLogger(__name__)


class Change(Enum):
    """Kind of a change. The names are those of the API."""

    REGISTERED = auto()
    REPLACED = auto()
    DELETED = auto()
    ALIAS_SET = auto()
    ALIAS_REMOVED = auto()
    LABELLED = auto()
    LOADING = auto()
    HOST = auto()
    RESIDENT = auto()
    DRAINING = auto()
    EVICTED = auto()
    MERGED = auto()
    UNMERGED = auto()
    PINNED = auto()
    UNPINNED = auto()


@dataclass(frozen=True, slots=True)
class Event:
    """A change and the adapter after it."""

    change: Change
    row: AdapterRow
    alias: str = ""


@dataclass(frozen=True, slots=True)
class FeedTable:
    """All adapters of a view at one moment, in the order of names."""

    rows: Sequence[AdapterRow]
    aliases: Mapping[str, Record]


class Watcher:
    """One reader of the feed, with a bounded backlog of changes; it is shown what `view` says."""

    def __init__(self, backlog: int, view: View) -> None:
        self.view = view
        self._events: deque[Event] = deque()
        self._backlog = backlog
        self._lost = False
        self._woken = asyncio.Event()

    def put(self, event: Event) -> None:
        """Adds a change. A full backlog is dropped, and `take` returns None."""
        if self._lost:
            return
        self._events.append(event)
        if len(self._events) > self._backlog:
            self._events.clear()
            self._lost = True
        self._woken.set()

    async def take(self) -> list[Event] | None:
        """Waits for changes and returns all since the last call; None if some were dropped."""
        await self._woken.wait()
        self._woken.clear()
        if self._lost:
            return None
        taken = list(self._events)
        self._events.clear()
        return taken

    def restart(self) -> None:
        """Empties the backlog, because the reader is about to get the whole table."""
        self._events.clear()
        self._lost = False
        self._woken.clear()


class AdapterFeed:
    """Publishes changes to any number of watchers.

    `read` returns the store's catalogue and `count` its change count; both may raise Refusal.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Catalogue]],
        count: Callable[[], Awaitable[int]],
        poll_seconds: float = POLL_SECONDS,
        backlog: int = BACKLOG,
    ) -> None:
        self._read = read
        self._count = count
        self._poll_seconds = poll_seconds
        self._backlog = backlog
        self._watchers: set[Watcher] = set()
        self._catalogue: Catalogue | None = None
        self._by_digest: dict[str, list[Record]] = {}
        self._statuses: dict[str, AdapterStatus] = {}
        self._residents: dict[View, int] = {}  # until the catalogue or the statuses change
        self._stale = asyncio.Event()
        self._reading = asyncio.Lock()
        self._follower: WatchedTask | None = None

    def __len__(self) -> int:
        return len(self._watchers)

    @contextmanager
    def watch(self, view: View) -> Iterator[Watcher]:
        """Adds a watcher for the duration of the context. Call `table` before reading from it."""
        watcher = Watcher(self._backlog, view)
        self._watchers.add(watcher)
        if self._follower is None:
            self._follower = WatchedTask(self._follow(), "adapter feed")
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._follower.cancel()
                self._follower = None
                self._catalogue = None
                self._by_digest = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Keeps the feed up to date within the context, for `residents`."""
        with self.watch(View()):
            yield

    async def residents(self, view: View) -> int:
        """Number of adapters on the device, of those that a view shows. Needs `followed`."""
        if self._catalogue is None:
            await self._refresh()
        if view not in self._residents:
            there = [each.digest for each in self._statuses.values() if each.state in ON_DEVICE]
            self._residents[view] = sum(bool(self._rows(digest, view)) for digest in there)
        return self._residents[view]

    async def table(self, watcher: Watcher) -> FeedTable:
        """All adapters now; the watcher gets every change after that."""
        if self._catalogue is None:
            await self._refresh()
        # No await from here on, so no change is lost between the table and the first change.
        view = watcher.view
        catalogue = (self._catalogue or Catalogue()).within(view.seen)
        watcher.restart()
        records = sorted(catalogue.names.items())
        rows = [view.row(record, self._statuses) for _, record in records]
        return FeedTable(rows, catalogue.aliases)

    def changed(self) -> None:
        """This process changed the store: makes the feed read the catalogue soon."""
        self._stale.set()

    def on_table(self, table: Sequence[AdapterStatus]) -> None:
        """Takes the engine's current table and publishes what changed since the last one."""
        before, self._statuses = self._statuses, {status.digest: status for status in table}
        self._residents.clear()
        if not self._watchers:
            return
        views = self._views()
        for digest in {**before, **self._statuses}:
            old, new = before.get(digest), self._statuses.get(digest)
            for change in _moves(old, new):
                for view, watchers in views.items():
                    for row in self._rows(digest, view):
                        _publish(Event(change, row), watchers)

    async def _follow(self) -> None:
        while True:
            # Not wait_for: before Python 3.12 it drops a cancellation that comes with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._stale.wait()
            try:
                stale, known = self._stale.is_set(), self._catalogue
                if stale or known is None or await self._count() != known.count:
                    await self._refresh()
            except Refusal as error:
                log.warning("watchers are not updated: the store cannot be read: %s", error.message)
                await asyncio.sleep(self._poll_seconds)
            except Exception:  # the next attempt may succeed; without this task none is made
                log.exception("watchers are not updated")
                await asyncio.sleep(self._poll_seconds)

    async def _refresh(self) -> None:
        """Reads the catalogue and publishes what changed since the last reading."""
        async with self._reading:
            self._stale.clear()
            new = await self._read()
            old, self._catalogue = self._catalogue, new
            self._residents.clear()
            self._by_digest = {}
            for record in new.names.values():
                self._by_digest.setdefault(record.digest, []).append(record)
            if old is not None:
                for view, watchers in self._views().items():
                    differences = _differences(old.within(view.seen), new.within(view.seen))
                    for change, record, alias in differences:
                        event = Event(change, view.row(record, self._statuses), alias)
                        _publish(event, watchers)

    def _views(self) -> Mapping[View, Sequence[Watcher]]:
        """The watchers by what they are shown."""
        views: dict[View, list[Watcher]] = defaultdict(list)
        for watcher in self._watchers:
            views[watcher.view].append(watcher)
        return views

    def _rows(self, digest: str, view: View) -> list[AdapterRow]:
        """The rows of a view that tell of the engine's copy with this digest."""
        if holder_of(digest) != view.copies:
            return []
        records = self._by_digest.get(files_digest(digest), ())
        if not records and not view.seen.terms:
            return [AdapterRow(digest, None, self._statuses.get(digest))]
        seen = (record for record in records if view.seen.matches(record.labels))
        return [view.row(record, self._statuses) for record in seen]


def _publish(event: Event, watchers: Sequence[Watcher]) -> None:
    for watcher in watchers:
        watcher.put(event)


def _differences(old: Catalogue, new: Catalogue) -> Iterator[tuple[Change, Record, str]]:
    """The changes from one catalogue to the next, each with its version and its alias, if any."""
    for name, record in new.names.items():
        before = old.names.get(name)
        if before is None:
            yield Change.REGISTERED, record, ""
        elif before.version != record.version:
            yield Change.REPLACED, record, ""
        elif before.labels != record.labels:
            yield Change.LABELLED, record, ""
    for name, record in old.names.items():
        if name not in new.names:
            yield Change.DELETED, record, ""
    for alias in {**old.aliases, **new.aliases}:
        left, now = old.aliases.get(alias), new.aliases.get(alias)
        if left and now and (left.name, left.version) == (now.name, now.version):
            continue
        if left:
            yield Change.ALIAS_REMOVED, left, alias
        if now:
            yield Change.ALIAS_SET, now, alias


def _moves(old: AdapterStatus | None, new: AdapterStatus | None) -> Iterator[Change]:
    """Changes between two statuses of an adapter; None stands for an adapter not in the engine."""
    before, now = old.state if old else "", new.state if new else ""
    if before != now:
        match now:
            case "loading" | "resident" | "draining":
                yield Change[now.upper()]
            case "host" if before in {"", "loading"}:
                yield Change.HOST
            case _:
                yield Change.EVICTED
    for was, is_now, set_, unset in (
        (old and old.pinned, new and new.pinned, Change.PINNED, Change.UNPINNED),
        (old and old.merged_bytes, new and new.merged_bytes, Change.MERGED, Change.UNMERGED),
    ):
        if bool(was) != bool(is_now):
            yield set_ if is_now else unset
