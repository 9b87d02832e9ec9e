"""Bookkeeping of KV blocks. The memory itself belongs to the runner.

A block has exactly one owner at a time: the pool, or the one request or adapter that reserved it.
So every block is either free or used; `check` verifies that.
"""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(Exception):
    """More blocks were requested than are free."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, numbered from `first` on.

    The cache proper starts at block 0 and cannot be empty; a region set aside behind it can.
    """

    def __init__(self, num_blocks: int, block_size: int, first: int = 0) -> None:
        if (num_blocks < 1 and not first) or block_size < 1:
            raise ValueError("a KV cache needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._first = first
        self._free = list(range(first + num_blocks - 1, first - 1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def free(self) -> int:
        """Number of blocks that can be reserved now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of reserved blocks."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.block_size)

    def reserve(self, count: int) -> list[int]:
        """Reserves `count` blocks. Raises `OutOfBlocks`, and reserves none, if fewer are free."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_used[block - self._first] = 1
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Frees reserved blocks."""
        for block in blocks:
            assert self._is_used[block - self._first], f"block {block} is free already"
            self._is_used[block - self._first] = 0
            self._free.append(block)

    def check(self) -> None:
        """Verifies that every block is either free or used. Raises `AssertionError`."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert sum(self._is_used) == self.used, "a block was lost"
        in_use = (self._is_used[block - self._first] for block in self._free)
        assert not any(in_use), "a free block is in use"
