"""Token buckets: how much may be used at once, and how soon it may be used again."""

from __future__ import annotations

import math
from typing import Final

MINUTE: Final = 60.0

_DUST: Final = 1e-6
"""Part of a unit that counts as nothing, because times are rounded."""


class Bucket:
    """An amount that is used up and refills steadily.

    It holds one minute's worth. So in any `t` seconds at most `per_minute * (1 + t / 60)` can be
    taken from it by those who ask `wait` first. It can be overdrawn; then it refills from below 0.

    Attributes:
        per_minute: units that it holds, and that refill in a minute.
    """

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        """Makes a full bucket. `now` is in seconds of one monotonic clock, as in all methods."""
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait(self, units: int, now: float) -> float:
        """Seconds until so many units are there; infinity if the bucket never holds them."""
        missing = units - self._refill(now)
        if missing <= _DUST:
            return 0.0
        if units > self.per_minute:
            return math.inf
        return missing * MINUTE / self.per_minute

    def take(self, units: int, now: float) -> None:
        """Uses units, whether they are there or not."""
        self._level = self._refill(now) - units

    def give_back(self, units: int, now: float) -> None:
        """Undoes a `take`."""
        self._level = min(float(self.per_minute), self._refill(now) + units)

    def resize(self, per_minute: int, now: float) -> None:
        """Changes the limit. What is there, or overdrawn, stays the same part of a minute's worth.

        A bucket that held nothing, because its limit was 0, is full then.
        """
        if per_minute == self.per_minute:
            return
        level = self._refill(now)
        part = level / self.per_minute if self.per_minute else 1.0
        self.per_minute = per_minute
        self._level = part * per_minute

    def is_full(self, now: float) -> bool:
        """Whether it is as it was when it was made."""
        return self._refill(now) >= self.per_minute - _DUST

    def _refill(self, now: float) -> float:
        gained = max(0.0, now - self._at) * self.per_minute / MINUTE
        self._at = max(now, self._at)
        self._level = min(float(self.per_minute), self._level + gained)
        return self._level
