"""Progress of long work over tensors of known sizes: tensors, bytes and the time that is left."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

LOG_SECONDS: Final = 10.0
"""Seconds between two lines of the log."""
DRAW_SECONDS: Final = 0.2
"""Seconds between two updates of the line on a terminal."""

log = logging.getLogger(__name__)


class ByteProgress:
    """A context in which `advance` is called for every tensor that is done.

    On a terminal one line is redrawn, and removed at the end; elsewhere a line is logged from time
    to time. The end is logged in both cases, unless it is an exception.
    """

    def __init__(
        self,
        what: str,
        tensors: int,
        nbytes: int,
        *,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`what` begins every line, such as "converting NAME".

        `tensors` and `nbytes` are those of the whole work. `stream` is standard error by default.
        """
        self._what, self._tensors, self._nbytes, self._now = what, tensors, nbytes, now
        self._stream = sys.stderr if stream is None else stream
        self._draws = self._stream.isatty()
        self._begun = self._shown = now()
        self._done = self._done_bytes = 0

    def __enter__(self) -> Self:
        log.info("%s: %d tensors, %.2f GB", self._what, self._tensors, self._nbytes / 1e9)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._draws:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        if kind is None:
            log.info("%s: done in %.0f s", self._what, self._now() - self._begun)

    def advance(self, nbytes: int) -> None:
        """Counts one more tensor of `nbytes`, and shows the progress if it is time."""
        self._done, self._done_bytes = self._done + 1, self._done_bytes + nbytes
        now = self._now()
        if now - self._shown < (DRAW_SECONDS if self._draws else LOG_SECONDS):
            return
        self._shown = now
        if not self._draws:
            log.info("%s", self._line(now))
            return
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("\r" + self._line(now)[:width] + "\x1b[K")
        self._stream.flush()

    def _line(self, now: float) -> str:
        left = (self._nbytes - self._done_bytes) * (now - self._begun) / max(1, self._done_bytes)
        return (
            f"{self._what}: {self._done} of {self._tensors} tensors, "
            f"{self._done_bytes / 1e9:.2f} of {self._nbytes / 1e9:.2f} GB, {_time(left)} left"
        )


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
