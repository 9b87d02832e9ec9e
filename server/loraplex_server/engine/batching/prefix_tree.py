"""Radix trees over kept KV blocks: which block holds what comes next after a beginning.

    root of the base    [t t t t] -- [t t t t] -- [t t t t]
                                \\-- [t t t u] -- [v v v v]     a block is found by its own tokens,
    root of adapter a   [t t t t] -- [t t t t]                  below the block before it

An edge is a dictionary key that has the block's tokens themselves; a look-up compares them, so two
beginnings are never taken for the same one. Each root stands for everything else that the keys and
values depend on, and a tree is reached through its root alone.

Whoever owns a block owns the blocks above it too, and releases the deepest first. Therefore a block
without an owner has none below it either, and of these the deepest were released before the others:
the block that has been unowned for longest is always a leaf, so evicting it takes constant time and
cuts nothing off.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from loraplex_server.engine.batching.kv import BlockPool


@dataclass(frozen=True, slots=True)
class Root:
    """What keys and values depend on besides the tokens before them, and who may use them.

    Attributes:
        adapters: `(digest, weight)` of the adapters that compute every token, in the order of their
            sum, weights as exact text; () for the base.
        merge: number of the merge whose dense copies compute instead; 0 for none. Dense copies
            round otherwise than the adapter's factors.
        is_long: whether the frequencies for long sequences apply.
        salt: the caller's salt; callers with different ones share nothing.
    """

    adapters: tuple[tuple[str, str], ...] = ()
    merge: int = 0
    is_long: bool = False
    salt: str = ""


@dataclass(slots=True, eq=False)
class KeptBlock:
    """A kept block in its tree.

    Attributes:
        block: its number in the pool.
        edge: the tokens in it, and what else distinguishes it from its siblings.
        parent: the block before it, or the root.
        is_kept: False once it was evicted or dropped; it is in no tree then.
        is_sound: logits that were computed from it were finite.
    """

    block: int
    edge: Hashable
    parent: KeptBlock | Root
    children: dict[Hashable, KeptBlock] = field(default_factory=dict)
    is_kept: bool = True
    is_sound: bool = False


class PrefixTree:
    """The kept blocks of a pool, below their roots. A root exists while it has blocks.

    Attributes:
        evictions: number of kept blocks that were reserved for other content.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._roots: dict[Root, dict[Hashable, KeptBlock]] = {}
        self._blocks: dict[int, KeptBlock] = {}
        self.evictions = 0
        pool.on_forget = self._evict

    def find(self, parent: KeptBlock | Root, edge: Hashable) -> KeptBlock | None:
        """The block that follows `parent` by `edge`; None if none is kept."""
        if isinstance(parent, Root):
            return self._roots[parent].get(edge) if parent in self._roots else None
        return parent.children.get(edge)

    def add(self, parent: KeptBlock | Root, edge: Hashable, block: int) -> KeptBlock:
        """Keeps a used block, which is not found yet. `parent` is kept, with the same owner."""
        assert self.find(parent, edge) is None, "the same content is kept twice"
        self._pool.keep(block)
        node = KeptBlock(block, edge, parent)
        self._blocks[block] = node
        if isinstance(parent, Root):
            self._roots.setdefault(parent, {})[edge] = node
        else:
            assert parent.is_kept, "a block is kept that cannot be found"
            parent.children[edge] = node
        return node

    def drop(self, node: KeptBlock) -> None:
        """Drops a block and all below it. Those in use stay with their owners, and are not found.

        Takes time in proportion to the number of blocks.
        """
        self._cut(node)
        dropped = [node]
        while dropped:
            one = dropped.pop()
            one.is_kept = False
            del self._blocks[one.block]
            self._pool.drop(one.block)
            dropped.extend(one.children.values())
            one.children.clear()

    def check(self) -> None:
        """Verifies the trees against the pool, by walking all of them. Raises `AssertionError`."""
        assert len(self._blocks) == self._pool.kept, "a kept block is in no tree"
        found = [node for nodes in self._roots.values() for node in nodes.values()]
        assert all(self._roots.values()), "a root without blocks was left"
        for node in found:
            found.extend(node.children.values())
            assert node.is_kept, "a dropped block can be found"
            assert self._blocks[node.block] is node, "a block is in two places"
            assert self.find(node.parent, node.edge) is node, "a block is lost to its parent"
            if not isinstance(node.parent, Root):
                above = self._pool.owners(node.parent.block)
                assert above >= self._pool.owners(node.block), "a block above has fewer owners"
                assert node.parent.is_sound >= node.is_sound, "a block above is less sound"
        assert len(found) == len(self._blocks), "a kept block cannot be found"

    def _evict(self, block: int) -> None:
        node = self._blocks.pop(block)
        assert not node.children, "a block is evicted before those below it"
        node.is_kept = False
        self._cut(node)
        self.evictions += 1

    def _cut(self, node: KeptBlock) -> None:
        if not isinstance(node.parent, Root):
            del node.parent.children[node.edge]
            return
        below = self._roots[node.parent]
        del below[node.edge]
        if not below:
            del self._roots[node.parent]
