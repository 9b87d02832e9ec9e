"""Seeded random draws that are the same for all versions of Python and on all machines."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
ENOUGH: Final = 1000
"""Number of repeated rows after which no new one is expected."""
Row = dict[str, str]


class Draw:
    """Random choices by `random()`, whose values Python guarantees for a seed."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def below(self, limit: int) -> int:
        """Returns an integer from 0 to `limit` - 1."""
        return int(self._random.random() * limit)

    def one(self, options: Sequence[T]) -> T:
        """Returns one of the options, with equal probabilities."""
        return options[self.below(len(options))]


def different(make: Callable[[int], Row], count: int) -> list[Row]:
    """Returns `count` rows with different prompts; `make` gets the number of the row.

    Raises ValueError if `make` does not give so many.
    """
    rows: dict[str, Row] = {}
    repeats = 0
    while len(rows) < count:
        row = make(len(rows))
        repeats = repeats + 1 if row["prompt"] in rows else 0
        if repeats == ENOUGH:
            raise ValueError(f"there are no {count:,} different rows; ask for fewer")
        rows.setdefault(row["prompt"], row)
    return list(rows.values())
