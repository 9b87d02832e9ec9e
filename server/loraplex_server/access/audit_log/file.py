"""The file of the audit log: lines are appended by a thread of its own.

A disk that hangs or is full holds up no call: lines that cannot be written are dropped and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from loraplex_server.metrics import Metrics

MAX_QUEUED: Final = 4096
"""Most lines that may wait for the disk; further ones are dropped."""

CLOSE_SECONDS: Final = 2.0
"""Seconds for which `AuditFile.close` waits: for a place in the queue, and then for the disk."""

log = logging.getLogger(__name__)


class AuditFile:
    """Appends lines of JSON to a file, which is created with mode 0600.

    If the file is renamed or removed while the server runs, the next line begins a new one. A line
    that could be written only in part is ended before the next one, also after a restart.
    """

    def __init__(self, path: Path, metrics: Metrics) -> None:
        """Opens the file. Raises OSError."""
        self._path = path
        self._metrics = metrics
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._lost = 0
        self._file = _OpenFile.at(path)
        self._thread = threading.Thread(target=self._work, name="audit log", daemon=True)
        self._thread.start()

    def write(self, fields: Mapping[str, Any]) -> None:
        """Takes a line, to which the time is added; see `AuditSink`."""
        try:
            self._lines.put_nowait(_line(fields))
        except queue.Full:
            self._lose("too many lines wait for the disk")

    def close(self) -> None:
        """Writes the lines that were taken, for a few seconds at most, and ends the thread."""
        try:
            self._lines.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._follow()
                self._report_lost()
                self._file.append(line)
            except OSError as error:
                self._lose(error.strerror or type(error).__name__)
            else:
                self._metrics.audit_lines("written", 1)
        os.close(self._file.number)

    def _follow(self) -> None:
        """Opens the file again if its path no longer leads to it. Raises OSError."""
        if not self._file.is_at(self._path):
            before = self._file
            self._file = _OpenFile.at(self._path)
            os.close(before.number)

    def _lose(self, why: str) -> None:
        """Counts a line that is not written; logs the first of several."""
        with self._lock:
            self._lost += 1
            is_first = self._lost == 1
        self._metrics.audit_lines("lost", 1)
        if is_first:
            log.error("the audit log cannot be written: %s; its lines are dropped", why)

    def _report_lost(self) -> None:
        """Says in the file how many lines are missing before the next one. Raises OSError."""
        with self._lock:
            lost = self._lost
        if not lost:
            return
        self._file.append(_line({"lines_lost": lost}))
        with self._lock:
            self._lost -= lost
        log.warning("the audit log is written again; %d lines were dropped", lost)


@dataclass(slots=True)
class _OpenFile:
    """A file to append to. `torn` if its last line has no end."""

    number: int
    device: int
    inode: int
    torn: bool

    @classmethod
    def at(cls, path: Path) -> _OpenFile:
        """Opens or creates the file. Raises OSError."""
        # Without blocking: the path may be a pipe that nobody reads.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        number = os.open(path, flags, 0o600)
        try:
            found = os.fstat(number)
            has_text = stat.S_ISREG(found.st_mode) and found.st_size > 0
            torn = has_text and os.pread(number, 1, found.st_size - 1) != b"\n"
        except OSError:
            os.close(number)
            raise
        return cls(number, found.st_dev, found.st_ino, torn)

    def is_at(self, path: Path) -> bool:
        """Whether the path leads to this file. Raises OSError if that cannot be said."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def append(self, line: bytes) -> None:
        """Appends a line. Raises OSError."""
        left = b"\n" + line if self.torn else line
        while left:
            left = left[os.write(self.number, left) :]
            self.torn = bool(left)


def _line(fields: Mapping[str, Any]) -> bytes:
    """A line of JSON in ASCII: whatever the fields hold, it is one line."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, **fields}, default=str).encode("ascii") + b"\n"
