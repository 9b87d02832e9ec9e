"""Which implementation computes a product: measured times, where they are kept, what they decide.

An implementation is called a candidate here and has a name. Some read a copy of the matrix that is
not otherwise on the device, so they can be chosen only for the matrices that have this copy.

Nothing here touches a device.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_model.base import durable

_LOGGER = logging.getLogger(__name__)
FILE = "products.json"
"""Name of the file of times, in the folder of compiled kernels."""

_FORMAT = 1
_MOST_CARDS = 16

Shape = tuple[int, int]
Times = Mapping[str, float]
"""Microseconds of a product by the name of the candidate; infinite for one that failed."""


class Timings:
    """Times measured on this machine, kept in a JSON file.

    `card` names everything on which a time depends: the device, its driver, the versions of the
    libraries and kernels, the compute type. Times of other cards are left in the file, the latest
    16. A damaged file counts as empty, and the next `save` replaces it.
    """

    def __init__(self, path: Path | None, card: str) -> None:
        """Reads the file, if there is one. Without a path nothing is kept."""
        self._path, self._card = path, card
        self._cards = _read(path) if path is not None else {}
        self._is_new = False

    def get(self, shape: Shape, rows: int, candidates: Iterable[str]) -> Times | None:
        """Times of exactly these candidates; None if one of them has not been measured."""
        kept = self._cards.get(self._card, {}).get(_key(shape), {}).get(str(rows), {})
        times = {name: kept[name] for name in candidates if name in kept}
        complete = len(times) == len(set(candidates))
        return {n: math.inf if t is None else t for n, t in times.items()} if complete else None

    def put(self, shape: Shape, rows: int, times: Times) -> None:
        """Replaces the times of a shape and a number of rows."""
        card = self._cards.setdefault(self._card, {})
        card.setdefault(_key(shape), {})[str(rows)] = {
            name: round(time, 2) if math.isfinite(time) else None for name, time in times.items()
        }
        self._is_new = True

    def save(self) -> None:
        """Writes the file if something was added. A full or read-only disk is only logged."""
        if self._path is None or not self._is_new:
            return
        mine = self._cards.pop(self._card)
        others = list(self._cards.items())[-(_MOST_CARDS - 1) :]
        self._cards = {**dict(others), self._card: mine}
        content = json.dumps({"format": _FORMAT, "cards": self._cards}, indent=1)
        try:
            durable.make_directory(self._path.parent)
            durable.write_atomically(self._path, content.encode())
            durable.flush(self._path.parent)
        except OSError as error:
            _LOGGER.warning("Times of products are not kept: %s: %s", self._path, error.strerror)
        self._is_new = False

    def rows(self) -> list[tuple[Shape, int, Times]]:
        """Everything known of this card: shape, number of rows, times."""
        found: list[tuple[Shape, int, Times]] = []
        for shape, buckets in self._cards.get(self._card, {}).items():
            out, _, fan_in = shape.partition("x")
            for rows, kept in buckets.items():
                times = {name: math.inf if t is None else t for name, t in kept.items()}
                found.append(((int(out), int(fan_in)), int(rows), times))
        return found


Kept = dict[str, dict[str, dict[str, dict[str, float | None]]]]


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _read(path: Path) -> Kept:
    try:
        data = durable.read_regular(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _LOGGER.warning("Times of products cannot be read: %s: %s", path, error.strerror)
        return {}
    try:
        found = json.loads(data)
        if found["format"] != _FORMAT:
            return {}
        return _checked(found["cards"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        _LOGGER.warning("The file of products' times is damaged and will be made again: %s", path)
        return {}


def _checked(cards: Kept) -> Kept:
    """The same, with everything in it of the right type. Raises ValueError or TypeError."""
    for card in cards.values():
        for shape, buckets in card.items():
            out, _, fan_in = shape.partition("x")
            int(out), int(fan_in)
            for rows, times in buckets.items():
                int(rows)
                for time in times.values():
                    if time is not None and not 0 < float(time) < math.inf:
                        raise ValueError(time)
    return cards


def best(times: Times, copies: Mapping[str, int], index: int) -> str:
    """The fastest candidate for matrix `index` of a shape.

    `copies` holds for each candidate that reads a copy how many matrices have it, the first ones.
    """
    possible = [name for name in times if name not in copies or index < copies[name]]
    return min(possible, key=lambda name: times[name])


@dataclass(slots=True)
class Group:
    """The matrices of one shape.

    Attributes:
        count: number of matrices.
        times: by number of rows.
        sizes: bytes of one copy by the candidate that reads it.
        copies: how many of the matrices have that copy, once it is decided.
    """

    shape: Shape
    count: int
    times: Mapping[int, Times]
    sizes: Mapping[str, int]
    copies: dict[str, int] = field(default_factory=dict)

    def gain(self, candidate: str) -> float:
        """Microseconds that a copy saves, summed over the measured numbers of rows."""
        saved = 0.0
        for times in self.times.values():
            reached = [t for n, t in times.items() if n not in self.sizes or self.copies.get(n)]
            saved += max(0.0, min(reached) - times.get(candidate, math.inf))
        return saved


def place_copies(groups: Sequence[Group], budget: int) -> None:
    """Decides `copies` of every group: those first that save most time for each byte.

    `budget` is the number of bytes for all copies. A copy that saves nothing is not made.
    """
    for group in groups:
        group.copies = dict.fromkeys(group.sizes, 0)
    left = {(n, name) for n, group in enumerate(groups) for name in group.sizes}
    while left:
        rank = {(n, name): groups[n].gain(name) / groups[n].sizes[name] for n, name in sorted(left)}
        n, name = max(rank, key=lambda each: rank[each])
        left.remove((n, name))
        if not rank[n, name] > 0:
            return
        group = groups[n]
        group.copies[name] = min(group.count, budget // group.sizes[name])
        budget -= group.copies[name] * group.sizes[name]
