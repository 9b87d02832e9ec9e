"""Mixes the examples of several files by weight: a function of the examples and the weights only.

An epoch takes every training example at least once. With weights, the examples of some files are
repeated until each file's share of the epoch is its weight. The file with the lowest weight for its
number of examples is taken once; of the others, whole passes over the file and then the first
examples in the order of their content's hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import floor
from typing import Final, Protocol, TypeVar

MOST_REPEATS: Final = 1000
"""Number of times that an example of a file may be in an epoch."""


class Hashed(Protocol):
    """An example with the digest of its content."""

    @property
    def digest(self) -> bytes: ...


Example = TypeVar("Example", bound=Hashed)


def mixed(files: Sequence[Sequence[Example]], weights: Sequence[float]) -> list[Example]:
    """Returns the examples of an epoch: file after file, in the order of each file.

    Args:
        files: examples of each file. A file without examples has no share.
        weights: shares of the files, in any unit; empty: each example is taken once.

    Raises:
        ValueError: an example would be there more than `MOST_REPEATS` times.
    """
    if not weights:
        return [example for file in files for example in file]
    filled = [(file, weight) for file, weight in zip(files, weights, strict=True) if file]
    scale = max((len(file) / weight for file, weight in filled), default=0.0)
    made: list[Example] = []
    for file, weight in filled:
        count = max(len(file), floor(scale * weight + 0.5))
        passes, rest = divmod(count, len(file))
        if passes + (rest > 0) > MOST_REPEATS:
            raise ValueError(
                f"an example would be in an epoch {passes:,} times, more than {MOST_REPEATS:,}; "
                "lower the weight of the small file, or raise those of the others"
            )
        more = set(sorted(range(len(file)), key=lambda i: file[i].digest)[:rest])
        for at, example in enumerate(file):
            made += [example] * (passes + (at in more))
    return made


def combined(digests: Sequence[str], weights: Sequence[float]) -> str:
    """Returns the digest of several files with their weights; of one file, its own."""
    if len(digests) == 1:
        return digests[0]
    parts = zip(digests, weights or [1.0] * len(digests), strict=True)
    text = "".join(f"{digest} {weight!r}\n" for digest, weight in parts)
    return hashlib.sha256(text.encode()).hexdigest()
