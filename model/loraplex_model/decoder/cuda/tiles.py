"""Tiles of query rows, by which the attention kernels divide a pass.

A tile holds rows of one sequence. A sequence with one new token, a decode row, is a short tile: its
context is cut into chunks that are computed side by side and added in their order. The rows of a
sequence with several new tokens, a prompt, are cut into tall tiles, each of which is computed by
programs that walk through the whole context.

A row's bits depend on its own sequence and on whether its tile is short or tall, which is whether
the pass holds one new token of the sequence or several. They depend neither on other rows, nor on
where the tiles of a prompt begin, nor on the number of tiles: keys that a row does not see leave
its sums as they are, and the length of a chunk follows from the length of the row's own context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 256
"""Keys in a chunk of a short context."""

MOST_CHUNKS = 32
"""A context has at most this many chunks; chunks of long contexts are longer than `CHUNK`."""

FIELDS = 5
"""Numbers that describe a tile, see `AttentionTiles`."""

_SHORT, _TALL = 16, 64


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """The tiles of one pass.

    A tile is described by its first row, its number of rows, its sequence, the position of its
    first row, and the number of keys in a chunk of its context.

    Attributes:
        short: int32 [n, FIELDS], the sequences with one new token.
        tall: int32 [m, FIELDS], the rows of all other sequences.
        chunks: the most chunks that a short tile has; 0 without short tiles.
    """

    short: NDArray[np.int32]
    tall: NDArray[np.int32]
    chunks: int


def height(group: int, *, is_short: bool) -> int:
    """Rows of the products of a tile, in which each row of the tile has its `group` query heads."""
    least = _SHORT if is_short else _TALL
    return max(least, 1 << (group - 1).bit_length())


def most_tall_tiles(rows: int, sequences: int, group: int) -> int:
    """The most tall tiles that a pass of `rows` new tokens of `sequences` sequences can have."""
    return rows // (height(group, is_short=False) // group) + sequences


def chunk_lengths(contexts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Keys in a chunk of each context: `CHUNK`, doubled until `MOST_CHUNKS` hold the context."""
    least = np.maximum(-(-contexts // (CHUNK * MOST_CHUNKS)), 1)
    doublings = np.ceil(np.log2(least)).astype(np.int32)  # exact for powers of two
    return (CHUNK << doublings).astype(np.int32)


def most_chunks(context: int) -> int:
    """The most chunks that a context of up to `context` keys has."""
    return min(-(-context // CHUNK), MOST_CHUNKS)


def plan_tiles(
    query_starts: NDArray[np.int32], context_lens: NDArray[np.int32], group: int
) -> AttentionTiles:
    """Cuts a pass into tiles, in the order of its sequences.

    Args:
        query_starts: int32 [S + 1], see `ForwardBatch`.
        context_lens: int32 [S], see `ForwardBatch`; 0 for a row of padding, which is in no tile.
        group: query heads that share a key/value head.
    """
    counts = np.diff(query_starts)
    used = (counts > 0) & (context_lens > 0)
    decode = np.flatnonzero(used & (counts == 1))
    contexts = context_lens[decode]
    chunks = chunk_lengths(contexts)
    ones = np.ones_like(decode)
    short = _columns(query_starts[decode], ones, decode, contexts - 1, chunks)

    per_tile = height(group, is_short=False) // group
    prompts = np.flatnonzero(used & (counts > 1))
    tiles = -(-counts[prompts] // per_tile)
    sequences = np.repeat(prompts, tiles)
    # the number of each tile within its sequence, times the rows of a full tile
    offsets = (np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * per_tile
    rows = np.minimum(counts[sequences] - offsets, per_tile)
    positions = context_lens[sequences] - counts[sequences] + offsets
    begins = query_starts[sequences] + offsets
    tall = _columns(begins, rows, sequences, positions, positions + rows)
    return AttentionTiles(short, tall, int((-(-contexts // chunks)).max(initial=0)))


def _columns(*columns: NDArray[np.integer]) -> NDArray[np.int32]:
    return np.stack(columns, axis=1).astype(np.int32)
