"""A rate by what recent steps have done."""

from __future__ import annotations


class RecentRate:
    """An amount over the seconds that it took; a step counts less the longer it is ago."""

    __slots__ = ("_amount", "_keep", "_left", "_seconds")

    def __init__(self, least: int, steps: int = 32) -> None:
        """The rate is 0 before `least` steps; `steps` is about how many it is taken over."""
        self._left = least
        self._keep = 1.0 - 1.0 / steps
        self._amount = 0.0
        self._seconds = 0.0

    def note(self, amount: float, seconds: float) -> None:
        """Notes a step."""
        self._left -= self._left > 0
        self._amount = self._keep * self._amount + amount
        self._seconds = self._keep * self._seconds + seconds

    @property
    def value(self) -> float:
        """The amount per second; 0 if it is not known."""
        return 0.0 if self._left or not self._seconds else self._amount / self._seconds
