"""Search for stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string; holds back text that may be the beginning of one.

    The text ends before the stop string that is completed first; of two that are completed together
    the longer one counts. The result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = frozenset(s[:n] for s in stops for n in range(1, len(s)))
        self._longest = max((len(s) for s in stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Adds text; returns text outside of any stop string, and whether one was found.

        No text may be pushed once a stop string was found.
        """
        if not self._stops:
            return text, False
        held = self._held + text
        matches = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if matches:
            self._held = ""
            return held[: min(matches)[1]], True
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def finish(self) -> str:
        """Returns the text that was held back, because no stop string followed."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest suffix of `text` that is the beginning of a stop string."""
        for n in range(min(self._longest, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0
