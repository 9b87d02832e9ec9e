"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on, holding back what may yet become a stop string.

    The completion ends before the stop string that is complete first; of two that end together,
    the longer one counts. What was passed on does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._beginnings = frozenset(s[:n] for s in stops for n in range(1, len(s)))
        self._longest = max((len(s) for s in stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """`(text that is surely no part of a stop string, whether a stop string is complete)`.

        Nothing may be pushed once one is.
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
        """The text that was held back and turned out to be none."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        for n in range(min(self._longest, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0
