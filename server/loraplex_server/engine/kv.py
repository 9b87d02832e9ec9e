"""KV blocks: which are free, and who may take them. The memory itself belongs to the runner.

A block has exactly one owner at a time: the pool, or the one request whose table names it. So every
block is free or used, never both and never neither; `check` says whether that still holds.
"""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a KV cache needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_used = bytearray(num_blocks)

    @property
    def free(self) -> int:
        """Blocks that can be reserved now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that requests own."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.block_size)

    def reserve(self, count: int) -> list[int]:
        """Hands out `count` blocks. Raises `OutOfBlocks` and hands out none if there are fewer."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_used[block] = 1
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Takes blocks back from their owner."""
        for block in blocks:
            assert self._is_used[block], f"block {block} is free already"
            self._is_used[block] = 0
            self._free.append(block)

    def check(self) -> None:
        """Verifies that every block is either free or used. Raises `AssertionError`."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert sum(self._is_used) == self.used, "a block was lost"
        assert not any(self._is_used[block] for block in self._free), "a free block is in use"
