"""The block pool: every block has one owner, always."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_server.engine.batching.kv import BlockPool, OutOfBlocks


def test_more_blocks_than_there_are_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(4, 16)
    held = pool.reserve(3)
    with pytest.raises(OutOfBlocks):
        pool.reserve(2)
    assert (pool.free, pool.used) == (1, 3)
    pool.release(held)
    assert (pool.free, pool.used) == (4, 0)


def test_a_block_cannot_be_given_back_twice() -> None:
    pool = BlockPool(2, 16)
    held = pool.reserve(1)
    pool.release(held)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(held)


def test_the_last_block_of_a_sequence_may_be_part_full() -> None:
    pool = BlockPool(8, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


@settings(deadline=None)
@given(st.lists(st.integers(-6, 6)))
def test_blocks_are_conserved(moves: list[int]) -> None:
    pool = BlockPool(10, 1)
    owners: list[list[int]] = []
    for move in moves:
        if move < 0 and owners:
            pool.release(owners.pop(move % len(owners)))
        elif 0 < move <= pool.free:
            owners.append(pool.reserve(move))
        held = [block for owner in owners for block in owner]
        assert len(set(held)) == len(held) == pool.used
        pool.check()


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_an_empty_cache_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(blocks, size)


MISTAKES: dict[str, Callable[[BlockPool, int], object]] = {
    "freed while it is used": lambda pool, block: pool.release([block, block]),
    "kept twice": lambda pool, block: pool.keep(block),
    "shared without being kept": lambda pool, _: pool.share(pool.reserve(1)[0]),
    "kept while it is free": lambda pool, _: pool.keep(7),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_with_kept_blocks_is_noticed(mistake: Callable[[BlockPool, int], object]) -> None:
    pool = BlockPool(8, 4)
    (block,) = pool.reserve(1)
    pool.keep(block)
    pool.check()
    with pytest.raises(AssertionError):
        mistake(pool, block)


def test_a_kept_block_is_forgotten_when_it_is_reserved_and_not_before() -> None:
    pool = BlockPool(4, 4)
    forgotten: list[int] = []
    pool.on_forget = forgotten.append
    one, two, three = pool.reserve(3)
    for block in (one, two, three):
        pool.keep(block)
    pool.release([one, two, three])
    assert (pool.kept, pool.free, pool.used) == (3, 4, 0)
    pool.share(one)
    assert (pool.owners(one), pool.free) == (1, 3)
    pool.drop(three)
    free = pool.reserve(2)
    assert (three in free, forgotten) == (True, [])
    pool.release([one])
    assert pool.reserve(1) == [two]
    assert pool.reserve(1) == [one]
    assert (forgotten, pool.kept) == ([two, one], 0)
    pool.check()
