"""Records what a program changes below a folder, and which of it was flushed to the disk.

The recorder stands between the program and the operating system's calls. A flush counts only if it
would reach the disk: where fsync has been replaced by nothing, nothing is ever safe.

SQLite flushes for itself, so a database is recorded as SQLite promises it: its last commit is safe
(`tests/adapters` checks that connections ask for this), and what is not committed is absent.
"""

from __future__ import annotations

import os
import posix
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base import faults
from power.disk import Change, Moment, Node, Place, applied, flushed

_DATABASE = ".sqlite3"
_OWN_FILES = ("-wal", "-shm", "-journal")
_CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "truncate")


class Recorder:
    """The changes below `top`, whose content is safe at the beginning.

    Attributes:
        moments: those at which power may fail, in their order.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._nodes: dict[int, Node] = {}
        self._numbers: dict[tuple[int, int], int] = {}  # by device and inode
        self._next = 1
        self._names: dict[Place, int] = {}
        self._seen: dict[Place, int] = {}
        self._pending: tuple[Change, ...] = ()
        self._databases: dict[str, tuple[sqlite3.Connection, int, bytes]] = {}
        self._acknowledged: set[str] = set()
        self.moments: list[Moment] = []
        self._look()
        self._names, self._pending = dict(self._seen), ()
        for number, node in self._nodes.items():
            self._nodes[number] = Node(node.is_directory, node.mode, node.seen, node.seen)

    def acknowledge(self, step: str) -> None:
        """Notes that the program has promised that a step is safe."""
        self._acknowledged.add(step)
        self.moment(f"acknowledged {step}")

    def moment(self, where: str) -> None:
        """Notes that power may fail now."""
        self._look()
        moment = Moment(
            where,
            frozenset(self._acknowledged),
            dict(self._names),
            self._pending,
            dict(self._nodes),
        )
        self.moments.append(moment)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what this process does in the context."""
        reaches_disk = os.fsync is posix.fsync
        with pytest.MonkeyPatch.context() as patch, faults.injected(self.moment):
            for call in _CHANGES:
                patch.setattr(os, call, self._around(call, getattr(os, call)))
            if reaches_disk:
                patch.setattr(os, "fsync", self._flushing(os.fsync))
                patch.setattr(os, "fdatasync", self._flushing(os.fdatasync))
            try:
                yield
            finally:
                for connection, _, _ in self._databases.values():
                    connection.close()

    def _around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **kwargs: Any) -> Any:
            self.moment(f"before {name}")
            try:
                return call(*args, **kwargs)
            finally:
                self.moment(f"after {name}")

        return changing

    def _flushing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def flushing(descriptor: Any) -> None:
            self.moment("before fsync")
            call(descriptor)
            stat = os.fstat(descriptor)
            number = 0 if os.path.samestat(stat, os.stat(self._top)) else None
            number = self._numbers.get((stat.st_dev, stat.st_ino), number)
            if number is None:
                return
            if number == 0 or self._nodes[number].is_directory:
                self._names, self._pending = flushed(self._names, self._pending, number)
            else:
                node = self._nodes[number]
                self._nodes[number] = Node(False, node.mode, node.seen, node.seen)
            self.moment("after fsync")

        return flushing

    def _look(self) -> None:
        """Compares the folder with what was seen before; there is at most one change of names."""
        seen: dict[Place, int] = {}
        numbers: dict[tuple[int, int], int] = {}
        left = [(0, self._top)]
        while left:
            directory, path = left.pop()
            for entry in os.scandir(path):
                if entry.name.endswith(_OWN_FILES):
                    continue
                stat = entry.stat(follow_symlinks=False)
                inode = (stat.st_dev, stat.st_ino)
                number = self._numbers.get(inode)
                if number is None:
                    number, self._next = self._next, self._next + 1
                    self._nodes[number] = Node(entry.is_dir(follow_symlinks=False), stat.st_mode)
                seen[directory, entry.name] = numbers[inode] = number
                if self._nodes[number].is_directory:
                    left.append((number, path / entry.name))
                else:
                    self._read(number, Path(entry.path), (directory, entry.name))
        self._numbers = numbers  # the number of an inode ends with its last name
        self._compare(seen)

    def _read(self, number: int, path: Path, place: Place) -> None:
        node = self._nodes[number]
        if path.name.endswith(_DATABASE):
            content = self._committed(path)
            self._nodes[number] = Node(False, node.mode, content, content)
            if content and self._names.get(place) != number:
                self._names[place] = number  # SQLite flushes the directory of its journal
                self._seen[place] = number
        else:
            content = path.read_bytes()
            if content != node.seen:
                self._nodes[number] = Node(False, node.mode, node.safe, content)

    def _compare(self, seen: dict[Place, int]) -> None:
        left: dict[int, list[Place]] = {}
        taken: dict[int, list[Place]] = {}
        for place, number in self._seen.items():
            if seen.get(place) != number:
                left.setdefault(number, []).append(place)
        for place, number in seen.items():
            if self._seen.get(place) != number:
                taken.setdefault(number, []).append(place)
        moved = {place for places in taken.values() for place in places}
        changes = [
            Change(number, tuple(left.get(number, ())), tuple(taken.get(number, ())))
            for number in sorted(left.keys() | taken.keys())
            # A name that another file has taken over left its own by the same rename.
            if number in taken or not moved.issuperset(left[number])
        ]
        self._pending += tuple(changes)
        self._seen = seen
        assert applied(self._names, self._pending) == seen

    def _committed(self, path: Path) -> bytes:
        """The database as of its last commit."""
        if path.stat().st_size == 0:
            return b""
        known = self._databases.get(str(path))
        connection = known[0] if known else sqlite3.connect(path, check_same_thread=False)
        try:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            if known and known[1] == version:
                return known[2]
            content = connection.serialize()
        except sqlite3.OperationalError:  # locked while its mode is changed
            if not known:
                connection.close()
            return known[2] if known else b""
        self._databases[str(path)] = (connection, version, content)
        return content
