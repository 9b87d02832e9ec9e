"""Search for stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string; holds back text that may be the beginning of one.

    The text ends before the stop string that is completed first; of two that are completed together
    the longer one counts. The result does not depend on how the text was cut into pieces.

    The text that is searched and the one that is returned may differ, as by special tokens.

    Attributes:
        matched: the stop string that was found; None as long as none was.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """With `include`, the stop string that was found is returned at the end."""
        self.matched: str | None = None
        self._include = include
        self._stops = tuple(stops)
        self._beginnings = frozenset(s[:n] for s in stops for n in range(1, len(s)))
        self._longest = max((len(s) for s in stops), default=1) - 1
        self._held = ""
        self._pieces: deque[tuple[str, str]] = deque()
        """What is held, as pieces to search with their pieces to return."""

    def push(self, text: str, shown: str | None = None, may_end: bool = True) -> tuple[str, bool]:
        """Adds text; returns text outside of any stop string, and whether one was found.

        `shown` is what is returned in place of `text`; None if they are the same. A stop string
        that this text completes is passed over unless it `may_end` the text. No text may be pushed
        once a stop string was found.
        """
        shown = text if shown is None else shown
        if not self._stops:
            return shown, False
        self._pieces.append((text, shown))
        before, held = len(self._held), self._held + text
        matches = [
            (at + len(s), at)
            for s in (self._stops if may_end else ())
            if (at := held.find(s, max(0, before - len(s) + 1))) >= 0
        ]
        if matches:
            end, begin = min(matches)
            self.matched = held[begin:end]
            return self._release(begin) + (self.matched if self._include else ""), True
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return self._release(len(held) - keep), False

    def finish(self) -> str:
        """Returns the text that was held back, because no stop string followed."""
        self._held = ""
        shown = "".join(shown for _, shown in self._pieces)
        self._pieces.clear()
        return shown

    def _undecided(self, text: str) -> int:
        """Length of the longest suffix of `text` that is the beginning of a stop string."""
        for n in range(min(self._longest, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0

    def _release(self, length: int) -> str:
        """Drops `length` characters of the held text; returns what is shown in their place."""
        released = []
        while self._pieces and len(self._pieces[0][0]) <= length:
            text, shown = self._pieces.popleft()
            length -= len(text)
            released.append(shown)
        if length:
            text, shown = self._pieces[0]
            at = _place(text, shown, length)
            self._pieces[0] = text[length:], shown[at:]
            released.append(shown[:at])
        return "".join(released)


def _place(text: str, shown: str, length: int) -> int:
    """The place in `shown` that corresponds to the first `length` characters of `text`.

    Their common end corresponds letter by letter. What precedes it counts as one letter.
    """
    common = 0
    for one, other in zip(reversed(text), reversed(shown), strict=False):
        if one != other:
            break
        common += 1
    before = len(text) - common
    return len(shown) - common + length - before if length >= before else 0
