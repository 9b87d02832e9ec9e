"""Bookkeeping of KV blocks. The memory itself belongs to the runner.

A block is either free or used, and `check` verifies that. A used block has one owner, the request
or adapter that reserved it, unless its content is kept: then several requests may own it, and it is
not written. A kept block without an owner is free, and its content stays until the block is
reserved again. What is kept and how it is found is known to the owner of `on_forget` alone.

    reserve -> used ---keep---> used, kept <--share-- further owners
       ^        |                   |
       |     release             last release
       |        v                   v
       +----- free             free, kept: reserved last, least recently used first
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


class OutOfBlocks(Exception):
    """More blocks were requested than are free."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, numbered from `first` on.

    The cache proper starts at block 0 and cannot be empty; a region set aside behind it can.

    Attributes:
        on_forget: called with each kept block that is reserved again, whose content is lost then.
    """

    def __init__(self, num_blocks: int, block_size: int, first: int = 0) -> None:
        if (num_blocks < 1 and not first) or block_size < 1:
            raise ValueError("a KV cache needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_forget: Callable[[int], None] = lambda block: None
        self._first = first
        self._free = list(range(first + num_blocks - 1, first - 1, -1))
        self._unowned: dict[int, None] = {}  # kept blocks without an owner, the oldest first
        self._owners = [0] * num_blocks
        self._kept: set[int] = set()

    @property
    def free(self) -> int:
        """Number of blocks that can be reserved now."""
        return len(self._free) + len(self._unowned)

    @property
    def used(self) -> int:
        """Number of blocks that have an owner."""
        return self.num_blocks - self.free

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.block_size)

    def owners(self, block: int) -> int:
        """Number of owners of a block; 0 if it is free."""
        return self._owners[block - self._first]

    def reserve(self, count: int) -> list[int]:
        """Reserves `count` blocks. Raises `OutOfBlocks`, and reserves none, if fewer are free."""
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.free} free")
        taken = [self._free.pop() if self._free else self._forget_oldest() for _ in range(count)]
        for block in taken:
            self._owners[block - self._first] = 1
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Ends an owner's hold on its blocks; those without another owner are free.

        Of kept blocks, those that come first in `blocks` are reserved again first.
        """
        for block in blocks:
            at = block - self._first
            assert self._owners[at], f"block {block} is free already"
            self._owners[at] -= 1
            if self._owners[at]:
                continue
            if block in self._kept:
                self._unowned[block] = None
            else:
                self._free.append(block)

    @property
    def kept(self) -> int:
        """Number of blocks whose content is kept, with and without an owner."""
        return len(self._kept)

    @property
    def cached(self) -> int:
        """Number of free blocks whose content is kept."""
        return len(self._unowned)

    def keep(self, block: int) -> None:
        """Keeps the content of a used block."""
        assert self.owners(block), f"the free block {block} is kept"
        assert block not in self._kept, f"block {block} is kept already"
        self._kept.add(block)

    def drop(self, block: int) -> None:
        """Ends that a block's content is kept, without a call of `on_forget`."""
        self._kept.remove(block)
        if block in self._unowned:
            del self._unowned[block]
            self._free.append(block)

    def share(self, block: int) -> None:
        """Adds an owner to a kept block."""
        assert block in self._kept, f"block {block} is shared, but not kept"
        self._unowned.pop(block, None)
        self._owners[block - self._first] += 1

    def check(self) -> None:
        """Verifies that every block is either free or used. Raises `AssertionError`."""
        free = [*self._free, *self._unowned]
        assert len(set(free)) == len(free), "a block is free twice"
        assert sum(map(bool, self._owners)) == self.used, "a block was lost"
        assert not any(map(self.owners, free)), "a free block is in use"
        assert self._unowned.keys() <= self._kept, "a block that is not kept waits to be found"
        assert not self._kept & set(self._free), "a kept block may be overwritten"

    def _forget_oldest(self) -> int:
        block = next(iter(self._unowned))
        del self._unowned[block]
        self._kept.remove(block)
        self.on_forget(block)
        return block
