"""Memory that this process takes, compared with the memory that the engine accounts for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MEASURE_SECONDS = 1.0
"""Shortest time between two measurements, each of which reads a file of the system."""

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Anonymous memory of this process in bytes; 0 if the system does not report it.

    Pages of mapped files are left out: the system takes those back by itself.
    """
    try:
        lines = _STATUS.read_bytes().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(b"RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class MemoryGauge:
    """The memory of this process, measured at most once in `MEASURE_SECONDS`.

    Attributes:
        at_start: bytes when the gauge was made: interpreter, base model and KV cache, before any
            adapter.
    """

    def __init__(
        self, clock: Callable[[], float], measure: Callable[[], int] = anonymous_bytes
    ) -> None:
        self._clock = clock
        self._measure = measure
        self._measured_at = clock()
        self._bytes = self.at_start = measure()

    @property
    def nbytes(self) -> int:
        """Bytes at the last measurement."""
        now = self._clock()
        if now - self._measured_at >= MEASURE_SECONDS:
            self._measured_at = now
            self._bytes = self._measure()
        return self._bytes
