"""Bad lines of data sets, gathered so that all of them are told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loraplex_model.base.refusal import Reason, Refusal

SHOWN: Final = 100
"""Lines told one by one; the others are counted."""


class Problems:
    """What is wrong, in the order in which it was found."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, path: Path, line: int, reason: str) -> None:
        """`reason` completes the sentence "this line …"."""
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{path}:{line}: {reason}")

    def check(self) -> None:
        """Raises Refusal (DATA_INVALID) if there are any."""
        if not self._count:
            return
        more = self._count - len(self._shown)
        last = [f"and {more:,} more bad lines"] if more else []
        raise Refusal.listing(Reason.DATA_INVALID, [*self._shown, *last])
