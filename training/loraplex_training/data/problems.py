"""Collects the bad lines of a data set, so that all of them are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Problem, Reason, Refusal

SHOWN: Final = 100
"""Number of bad lines that are listed; the others are counted."""


class Dropped(ValueError):
    """A line that is left out and counted. The message completes the sentence "this line …"."""


class Problems:
    """The bad lines in the order in which they were found."""

    def __init__(self) -> None:
        self._shown: list[Problem] = []
        self._count = 0

    def add(self, path: Path, line: int, reason: str, field: str = "data") -> None:
        """Adds a bad line of the file that the option `field` names.

        `reason` completes the sentence "this line …".
        """
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(Problem(field, f"{path}:{line}: {reason}"))

    def check(self) -> None:
        """Raises Refusal(DATA_INVALID) if there are bad lines."""
        if not self._count:
            return
        more = self._count - len(self._shown)
        last = [Problem("data", f"and {more:,} more bad lines")] if more else []
        raise Refusal.listing(Reason.DATA_INVALID, [*self._shown, *last])
