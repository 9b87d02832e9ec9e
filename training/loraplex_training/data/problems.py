"""Collects the bad lines and the dropped lines of a data set, so that all are reported at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Problem, Reason, Refusal

SHOWN: Final = 100
"""Number of bad lines that are listed; the others are counted."""
MOST_CAUSES: Final = 50
"""Number of different causes of dropped lines; others are counted together."""
OTHER_CAUSES: Final = "cannot be used for another reason; --strict names it"


class Dropped(ValueError):
    """A line that is dropped and counted, because nothing can be learned from it.

    Attributes:
        cause: why, without what differs from line to line. Completes the sentence "this line …".
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        """`detail` says where in the line, or more about it."""
        super().__init__(f"{cause}; {detail}" if detail else cause)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class DroppedLine:
    """A line that was dropped, and why; the cause completes the sentence "this line …"."""

    path: Path
    line: int
    cause: str

    @property
    def place(self) -> str:
        """The line as "file:line"."""
        return f"{self.path}:{self.line}"


class Problems:
    """The bad lines and the dropped lines, in the order in which they were found.

    Attributes:
        dropped: the dropped lines.
    """

    def __init__(self, strict: bool = False) -> None:
        """With `strict`, lines that would be dropped are bad lines."""
        self.dropped: list[DroppedLine] = []
        self._strict = strict
        self._shown: list[Problem] = []
        self._count = 0
        self._causes: dict[str, str] = {}

    def add(self, path: Path, line: int, reason: str, field: str = "data") -> None:
        """Adds a bad line of the file that the option `field` names.

        `reason` completes the sentence "this line …".
        """
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(Problem(field, f"{path}:{line}: {reason}"))

    def drop(self, path: Path, line: int, error: Dropped, field: str = "data") -> None:
        """Adds a dropped line, or a bad one if lines must not be dropped."""
        if self._strict:
            self.add(path, line, str(error), field)
        else:
            self.drop_always(path, line, error.cause)

    def drop_always(self, path: Path, line: int, cause: str) -> None:
        """Adds a line that is dropped even if `strict` is set."""
        if cause not in self._causes and len(self._causes) >= MOST_CAUSES:
            cause = OTHER_CAUSES
        self.dropped.append(DroppedLine(path, line, self._causes.setdefault(cause, cause)))

    def check(self) -> None:
        """Raises Refusal(DATA_INVALID) if there are bad lines."""
        if not self._count:
            return
        more = self._count - len(self._shown)
        last = [Problem("data", f"and {more:,} more bad lines")] if more else []
        raise Refusal.listing(Reason.DATA_INVALID, [*self._shown, *last])
