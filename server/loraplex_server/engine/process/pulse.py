"""Signs of life of the engine process: sent by a thread of its own, and judged by the front.

A process that is stopped, or whose machine hangs, sends nothing. If only the main loop hangs, the
thread goes on sending, but the number of turns no longer grows.

    engine   main loop --turns, waiting--> Pulse --beat--> socket
    front    socket --> PulseCheck.heard --> PulseCheck.look: silent, stuck, or healthy
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from loraplex_server.engine.messages import Beat

BEAT_SECONDS: Final = 3.0
"""Seconds between two beats."""


class Pulse:
    """State of the engine's main loop, which alone writes it.

    Attributes:
        turns: number of turns of the loop.
        waiting: the loop waits for messages.
    """

    __slots__ = ("turns", "waiting")

    def __init__(self) -> None:
        self.turns = 0
        self.waiting = False

    def beat(self, send: Callable[[Beat], None], seconds: float) -> None:
        """Sends a `Beat` every `seconds`. Never returns."""
        while True:
            send(Beat(self.turns, self.waiting))
            time.sleep(seconds)


class Hang(StrEnum):
    """Ways in which an engine process that has not ended can be lost."""

    SILENT = "silent"
    STUCK = "stuck"


class PulseCheck:
    """Judges the beats of one engine process. All times are seconds.

    Only time in which this process itself runs is counted: at most two `tick` per call of `look`.
    So a pause of the whole machine does not count against the engine.
    """

    def __init__(self, silent_seconds: float, stuck_seconds: float) -> None:
        """A hang is `silent_seconds` without a message or `stuck_seconds` without a turn."""
        self._silent_seconds = silent_seconds
        self._stuck_seconds = stuck_seconds
        self._silence = 0.0
        self._stuck = 0.0
        self._turns = -1
        self._looked: float | None = None

    @property
    def tick(self) -> float:
        """Seconds between two calls of `look`."""
        return min(BEAT_SECONDS, self._silent_seconds / 4, self._stuck_seconds / 4)

    def heard(self, beat: Beat | None) -> None:
        """Notes a message, which may be a beat."""
        self._silence = 0.0
        if beat is not None and (beat.waiting or beat.turns != self._turns):
            self._turns = beat.turns
            self._stuck = 0.0

    def look(self, now: float) -> Hang | None:
        """How the process hangs at `now` (`time.monotonic()`); None if it is healthy."""
        passed = 0.0 if self._looked is None else min(now - self._looked, 2 * self.tick)
        self._looked = now
        self._silence += passed
        self._stuck += passed
        if self._silence > self._silent_seconds:
            return Hang.SILENT
        return Hang.STUCK if self._stuck > self._stuck_seconds else None
