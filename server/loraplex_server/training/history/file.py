"""The file of a job's events. Its methods block and may raise OSError."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from loraplex_model.base.durable import flush, read_regular, write_atomically

from loraplex_server.training.history.events import JobEventRecord

MAX_EVENTS: Final = 20_000
"""Most events of a job. At about 150 bytes each, they take three megabytes."""

EVENTS: Final = "events.jsonl"

_MODE: Final = 0o600

log = logging.getLogger(__name__)


class EventFile:
    """Appends to the events of one job, and reads them. Lines that are damaged are skipped.

    Attributes:
        last: number of the newest event; 0 if there is none. Set by `open`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS
        self._count = 0
        self.last = 0

    def open(self) -> None:
        """Looks at what is there. The end of a line that a crash cut off is removed."""
        content = self._content()
        if content and not content.endswith(b"\n"):
            whole = content.rfind(b"\n") + 1
            os.truncate(self._path, whole)
            content = content[:whole]
        found = list(_decoded(content))
        self._count = len(found)
        self.last = max((event.number for event in found), default=0)

    def append(self, events: Sequence[JobEventRecord], durably: bool = False) -> None:
        """Appends events; with `durably`, they are on the disk on return."""
        lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._path, flags, _MODE), "ab") as file:
            file.write(lines)
        if durably:
            flush(self._path)
        self._count += len(events)
        if self._count > MAX_EVENTS:
            self._rewrite(thinned(self.read(), MAX_EVENTS * 3 // 4))

    def rewind(self, step: int) -> None:
        """Removes the trainer's events after `step`, which it is about to repeat."""
        found = list(self.read())
        kept = [event for event in found if event.step is None or event.step <= step]
        if len(kept) < len(found):
            self._rewrite(kept)

    def read(self) -> Iterator[JobEventRecord]:
        """Yields the events, the oldest first."""
        return _decoded(self._content())

    def _rewrite(self, events: Sequence[JobEventRecord]) -> None:
        lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        write_atomically(self._path, lines, mode=_MODE)
        self._count = len(events)

    def _content(self) -> bytes:
        try:
            return read_regular(self._path)
        except FileNotFoundError:
            return b""


def thinned(events: Iterator[JobEventRecord], most: int) -> list[JobEventRecord]:
    """Drops every second step until there are at most `most` events, then every second evaluation.

    The first and the newest of a kind stay. All other events stay in any case.
    """
    found = list(events)
    kinds: tuple[Callable[[JobEventRecord], bool], ...] = (
        lambda event: event.progress is not None,
        lambda event: event.evaluation is not None,
    )
    for is_kind in kinds:
        while len(found) > most and sum(map(is_kind, found)) > 2:
            found = _halved(found, is_kind)
    return found


def _halved(
    events: list[JobEventRecord], is_kind: Callable[[JobEventRecord], bool]
) -> list[JobEventRecord]:
    places = [place for place, event in enumerate(events) if is_kind(event)]
    dropped = set(places[1:-1:2])
    return [event for place, event in enumerate(events) if place not in dropped]


def _decoded(content: bytes) -> Iterator[JobEventRecord]:
    for line in content.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line, type=JobEventRecord)
