"""A directory whose folders are adapters: what appears there is registered.

The directory is listed once in an interval. A folder counts as complete when nothing in it has
changed for an interval, so a copy in progress is left alone. Its name is the adapter's name.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from loraplex.sources.foreign_ids import name_of
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, open_below
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.declared.labels import LABELS_FILE, NO_LABELS, DirectoryLabels
from loraplex_server.exits import ServerExit
from loraplex_server.registry.sources import Source
from loraplex_server.registry.terms import Registered
from loraplex_server.runtime.failures import StartFailure, for_operator
from loraplex_server.series import Series

OWNER: Final = "directory"
"""Source of the versions that were registered from the directory."""

STATES: Final = ("registered", "waiting", "refused")
MOST_FOLDERS: Final = 10_000

_READ: Final = (CONFIG_FILE, WEIGHTS_FILE, "model.sig", LABELS_FILE)
_PASSING: Final = (Reason.OVERLOADED, Reason.STORE_UNAVAILABLE, Reason.STORE_FULL)
"""Reasons that lie not with the folder, which is tried again."""

Mark: TypeAlias = tuple[tuple[int, ...], ...]

log = logging.getLogger(__name__)


class Ensure(Protocol):
    """Registers the adapter in `source`, if it is not registered. Raises Refusal."""

    def __call__(
        self, name: str, source: Source, labels: Mapping[str, str], owner: str
    ) -> Awaitable[Registered]: ...


@dataclass(slots=True)
class Folder:
    """A folder of the directory, as it was found last.

    Attributes:
        mark: sizes, times and inodes of its files.
        handled: the mark with which it was registered or refused; None if it must be looked at.
        state: one of `STATES`.
        complaint: why it is refused, as it was logged.
        missed: number of listings since it was there.
    """

    mark: Mark
    handled: Mark | None = None
    state: str = "waiting"
    complaint: str = ""
    missed: int = 0


@dataclass(slots=True)
class DirectoryWatch:
    """Follows the folders of a directory. Create it with `begin`.

    Only names that came from the directory are moved or deleted. An adapter that a client deletes
    comes back when its folder changes, or when the server starts again.
    """

    root: Path
    ensure: Ensure
    remove: Callable[[str, str], Awaitable[bool]]
    series: Series
    seconds: float
    removes: bool
    labels: DirectoryLabels = NO_LABELS
    folders: dict[str, Folder] = field(default_factory=dict)
    _place: tuple[int, int] | None = None
    _complaint: str = ""

    @classmethod
    async def begin(
        cls,
        root: Path,
        ensure: Ensure,
        remove: Callable[[str, str], Awaitable[bool]],
        series: Series,
        seconds: float,
        removes: bool,
        labels: DirectoryLabels = NO_LABELS,
    ) -> DirectoryWatch:
        """Registers the folders that have not changed for an interval. Raises StartFailure."""
        watch = cls(root, ensure, remove, series, seconds, removes, labels)
        if not await asyncio.to_thread(root.is_dir):
            text = f"adapter_directory: {root} is not a directory"
            raise StartFailure(ServerExit.BAD_CONFIG, text)
        await watch.look()
        return watch

    async def run(self) -> None:
        """Looks again and again until it is cancelled."""
        while True:
            await asyncio.sleep(self.seconds)
            try:
                await self.look()
            except Exception:  # the next attempt may succeed; without this task none is made
                log.exception("the adapter directory was not looked at")

    async def look(self) -> None:
        """Lists the directory, and registers, replaces and removes what has changed."""
        try:
            place, marks = await asyncio.to_thread(_listing, self.root)
        except OSError as error:
            self._complain(f"the adapter directory {self.root} is away: {error.strerror}")
            return
        self._complain("")
        if self._place not in (None, place):  # another disk: what is not there was not removed
            self.folders = {}
        is_first, self._place = self._place is None, place
        for name, mark in marks.items():
            known = self.folders.get(name)
            settled = known is not None and known.mark == mark
            if known is None:
                known = self.folders[name] = Folder(mark)
                settled = is_first and _is_old(mark, self.seconds)
            known.mark, known.missed = mark, 0
            if settled and known.handled != mark:
                await self._take(name, known)
        for name in [name for name in self.folders if name not in marks]:
            await self._miss(name)
        self._count()

    async def _take(self, name: str, folder: Folder) -> None:
        """Registers the adapter in a folder, or reports once why it cannot be."""
        mark = folder.mark
        try:
            adapter_name, of_name = name_of(name)
            source = partial(open_below, self.root, name)
            labels = await asyncio.to_thread(self.labels.read, source)
            done = await self.ensure(adapter_name, source, {**labels, **of_name}, OWNER)
        except (Refusal, ValueError) as error:
            text = for_operator(error) if isinstance(error, Refusal) else str(error)
            folder.state = "refused"
            if text != folder.complaint:
                folder.complaint = text
                log.warning("the folder %r of the adapter directory is not taken: %s", name, text)
            if isinstance(error, Refusal) and error.reason in _PASSING:
                return
        else:
            folder.state, folder.complaint = "registered", ""
            log.info("the folder %r of the adapter directory is %s", name, done.record.id)
        folder.handled = mark

    async def _miss(self, name: str) -> None:
        """Notes that a folder is not there; the second time, its adapter may be deleted.

        The first time it may be in the middle of a replacement.
        """
        folder = self.folders[name]
        folder.missed += 1
        if folder.missed < 2:
            return
        if self.removes and folder.state == "registered":
            try:
                if await self.remove(name_of(name)[0], OWNER):
                    log.info("the folder %r has gone; its adapter is deleted", name)
            except Refusal as refusal:
                log.warning("the adapter of %r is not deleted: %s", name, for_operator(refusal))
                if refusal.reason in _PASSING:
                    return
        del self.folders[name]

    def _count(self) -> None:
        states = Counter(folder.state for folder in self.folders.values())
        for state in STATES:
            self.series.directory_adapters.labels(state).set(states[state])

    def _complain(self, text: str) -> None:
        if text and text != self._complaint:
            log.warning("%s", text)
        self._complaint = text


def _listing(root: Path) -> tuple[tuple[int, int], dict[str, Mark]]:
    """The directory's own place, and the marks of its folders by name. Raises OSError."""
    status = os.stat(root)
    found: dict[str, Mark] = {}
    with os.scandir(root) as entries:
        for entry in entries:
            is_shown = not entry.name.startswith(".") and entry.name != "lost+found"
            if is_shown and entry.is_dir() and len(found) < MOST_FOLDERS:
                found[entry.name] = tuple(_marks(Path(entry.path)))
    return (status.st_dev, status.st_ino), dict(sorted(found.items()))


def _marks(folder: Path) -> Iterator[tuple[int, ...]]:
    """What changes when the folder, or a file of its adapter, changes."""
    for path in (folder, *(folder / name for name in _READ)):
        try:
            status = os.stat(path)
        except OSError:
            yield ()
        else:
            yield status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino


def _is_old(mark: Mark, seconds: float) -> bool:
    """Whether nothing has changed for so long, by times that no program can set."""
    newest = max((each[0] for each in mark if each), default=0)
    return 0 < newest < time.time_ns() - seconds * 1e9
