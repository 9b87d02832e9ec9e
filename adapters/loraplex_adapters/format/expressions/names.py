"""Names of modules as a tree of their parts, in which equal branches are one node.

The layers of a model have the same modules, so a model has few distinct branches, and an expression
is evaluated once for each instead of once for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A branch of the tree.

    Attributes:
        number: number of the node in its tree.
        ways: what may follow, up to and with the next dot, and the node there; None for an end.
    """

    number: int
    ways: tuple[tuple[str, Node | None], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """A collection of names as a tree."""

    root: Node

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """The tree of names, which are made of letters, digits, `_` and dots."""
        return cls(_tree(tuple(names)))


_Branches = dict[str, "_Branches | None"]


@lru_cache(16)
def _tree(names: tuple[str, ...]) -> Node:
    branches: _Branches = {}
    for name in names:
        here = branches
        *above, last = name.split(".")
        for part in above:
            below = here.setdefault(f"{part}.", {})
            assert below is not None, "only ends, which have no dot, have no branch"
            here = below
        here[last] = None
    known: dict[tuple[tuple[str, int | None], ...], Node] = {}
    return _node(branches, known)


def _node(branches: _Branches, known: dict[tuple[tuple[str, int | None], ...], Node]) -> Node:
    ways = tuple((text, None if b is None else _node(b, known)) for text, b in branches.items())
    key = tuple((text, None if child is None else child.number) for text, child in ways)
    return known.setdefault(key, Node(len(known), ways))
