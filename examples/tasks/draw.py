"""Seeded draws that stay the same: from one Python to the next, from one machine to another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
ENOUGH: Final = 1000
"""Repeats in a row after which no new row is to be expected."""
Row = dict[str, str]


class Draw:
    """Choices by `random()`, whose values Python promises to keep for a seed."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def below(self, limit: int) -> int:
        """An integer from 0 to `limit` - 1."""
        return int(self._random.random() * limit)

    def one(self, options: Sequence[T]) -> T:
        """One of them, each as likely."""
        return options[self.below(len(options))]


def different(make: Callable[[int], Row], count: int) -> list[Row]:
    """`count` rows of different prompts; `make` gets the number of the row.

    Raises ValueError if there are not so many.
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
