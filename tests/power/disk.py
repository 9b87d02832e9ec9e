"""A model of a disk that loses power: which changes were flushed, and what may be left of others.

It is that of a journalling file system which orders neither data nor changes of directories:

- the bytes of a file are safe once the file was flushed. Until then it may have its old bytes, its
  new ones, a part of them, none, or zeros of the right length;
- a change of a directory (a name that is made, moved or removed) is safe once that directory was
  flushed. Any set of the others may be lost. A rename is atomic, also between directories.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Place = tuple[int, str]
"""A name in a directory: the directory's node and the name. Node 0 is the top."""


@dataclass(frozen=True, slots=True)
class Change:
    """One atomic change of names: `node` leaves the places `left`, and appears at `taken`."""

    node: int
    left: tuple[Place, ...]
    taken: tuple[Place, ...]

    def touches(self, directory: int) -> bool:
        return any(place[0] == directory for place in (*self.left, *self.taken))


@dataclass(frozen=True, slots=True)
class Node:
    """A file or directory: its mode, the bytes that are safe, and those that programs see."""

    is_directory: bool
    mode: int
    safe: bytes = b""
    seen: bytes = b""


Tree = Mapping[str, Node]
"""What is on a disk after power has come back: relative paths, parents first; `seen` is read."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment at which power may fail.

    Attributes:
        where: the event before it.
        acknowledged: what had been promised to be safe.
        names: the safe places and their nodes.
        pending: changes of names that are not safe, in their order.
        nodes: every file and directory.
    """

    where: str
    acknowledged: frozenset[str]
    names: Mapping[Place, int]
    pending: tuple[Change, ...]
    nodes: Mapping[int, Node]

    def everything(self) -> Tree:
        """The tree if nothing is lost."""
        names = applied(self.names, self.pending)
        return self._tree(names, {n: node.seen for n, node in self.nodes.items()})

    def trees(self, choice: random.Random, limit: int) -> Iterator[Tree]:
        """The trees that may be left: all of them if they are at most `limit`, else a sample.

        A sample contains the trees in which everything, nothing, and each single thing is lost.
        """
        unsafe = {n: self._remains(n, choice) for n in self._unsafe()}
        sizes = [2] * len(self.pending) + [len(remains) for remains in unsafe.values()]
        ranges = [range(size) for size in sizes]
        picks: Iterable[Sequence[int]] = itertools.product(*ranges)
        if math.prod(sizes) > limit:
            picks = itertools.islice(_sample(ranges, choice), limit)
        for pick in picks:
            kept = [change for change, lost in zip(self.pending, pick, strict=False) if not lost]
            contents = {
                n: remains[number]
                for (n, remains), number in zip(
                    unsafe.items(), pick[len(self.pending) :], strict=True
                )
            }
            yield self._tree(applied(self.names, kept), contents)

    def _unsafe(self) -> list[int]:
        """Files with bytes that are not safe, and that have a name in some outcome."""
        reachable = set(self.names.values()) | {change.node for change in self.pending}
        return [n for n, node in self.nodes.items() if node.safe != node.seen and n in reachable]

    def _remains(self, number: int, choice: random.Random) -> list[bytes]:
        """The contents that a file may have; the first is what programs saw."""
        safe, seen = self.nodes[number].safe, self.nodes[number].seen
        grown = seen.startswith(safe)
        kept = len(safe) if grown else 0
        cut = choice.randint(kept, max(kept, len(seen) - 1))
        zeros = bytes(len(seen) - kept)
        found = [seen, safe, seen[:cut], seen[:kept] + zeros, seen[:cut] + bytes(len(seen) - cut)]
        return list(dict.fromkeys(found if grown else [*found, b""]))

    def _tree(self, names: Mapping[Place, int], contents: Mapping[int, bytes]) -> Tree:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), node in names.items():
            inside.setdefault(directory, []).append((name, node))
        tree: dict[str, Node] = {}
        left = [(0, "")]
        while left:
            directory, path = left.pop()
            for name, number in inside.get(directory, ()):
                node = self.nodes[number]
                content = contents.get(number, node.seen)
                tree[path + name] = Node(node.is_directory, node.mode, content, content)
                if node.is_directory:
                    left.append((number, f"{path}{name}/"))
        return tree


def applied(names: Mapping[Place, int], changes: Iterable[Change]) -> dict[Place, int]:
    """The names after changes, some of which may depend on others that were lost."""
    found = dict(names)
    for change in changes:
        for place in change.left:
            if found.get(place) == change.node:
                del found[place]
        if change.taken:  # it is in one place only, wherever it was if earlier moves were lost
            for place in [place for place, node in found.items() if node == change.node]:
                del found[place]
            found.update(dict.fromkeys(change.taken, change.node))
    return found


def flushed(
    names: Mapping[Place, int], pending: Sequence[Change], directory: int
) -> tuple[dict[Place, int], tuple[Change, ...]]:
    """The safe names and the pending changes after a directory was flushed."""
    safe = [change for change in pending if change.touches(directory)]
    last = {change.node: number for number, change in enumerate(pending) if change in safe}
    left = (
        change
        for number, change in enumerate(pending)
        if change not in safe and number > last.get(change.node, -1)
    )
    return applied(names, safe), tuple(left)


def _sample(ranges: Sequence[range], choice: random.Random) -> Iterator[list[int]]:
    yield [0] * len(ranges)
    yield [1] * len(ranges)
    yield [min(2, len(r) - 1) if len(r) > 2 else 0 for r in ranges]  # torn files, all names
    yield [len(r) - 1 if len(r) > 2 else 0 for r in ranges]  # zeros, all names
    for at in choice.sample(range(len(ranges)), len(ranges)):
        yield [int(here == at) for here in range(len(ranges))]
        yield [int(here != at) for here in range(len(ranges))]
    while True:
        yield [choice.choice(r) for r in ranges]
