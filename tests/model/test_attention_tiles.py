"""Tiles of query rows: each row is in one tile, and what its bits depend on is its own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from loraplex_model.decoder.cuda import tiles

GROUPS = st.integers(1, 40)
# new tokens and tokens in the cache before them; a row of padding is (1, None)
SEQUENCES = st.lists(
    st.tuples(
        st.one_of(st.just(1), st.integers(1, 200)),
        st.one_of(st.none(), st.integers(0, 40000)),
    ).filter(lambda s: s[1] is not None or s[0] == 1),
    max_size=12,
)


def plan(
    sequences: list[tuple[int, int | None]], group: int
) -> tuple[np.ndarray, np.ndarray, tiles.AttentionTiles]:
    counts = [count for count, _ in sequences]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    contexts = np.array([0 if p is None else p + n for n, p in sequences], np.int32)
    return starts, contexts, tiles.plan_tiles(starts, contexts, group)


@given(SEQUENCES, GROUPS)
def test_each_row_is_in_one_tile_of_its_sequence(
    sequences: list[tuple[int, int | None]], group: int
) -> None:
    starts, contexts, found = plan(sequences, group)
    seen: list[tuple[int, int, int]] = []
    for kind, is_short in ((found.short, True), (found.tall, False)):
        assert kind.dtype == np.int32
        assert kind.shape[1] == tiles.FIELDS
        most = tiles.height(group, is_short=is_short) // group
        for begin, rows, sequence, position, chunk in kind.tolist():
            assert 1 <= rows <= (1 if is_short else most)
            assert is_short == (starts[sequence + 1] - starts[sequence] == 1)
            seen += [(begin + r, sequence, position + r) for r in range(rows)]
            if is_short:
                assert chunk * tiles.MOST_CHUNKS >= position + 1
            else:
                assert chunk == position + rows
    wanted = [
        (int(starts[s]) + r, s, past + r)
        for s, (count, past) in enumerate(sequences)
        if past is not None
        for r in range(count)
    ]
    assert sorted(seen) == wanted
    rows, used = sum(n for n, _ in sequences), len(sequences)
    assert len(found.tall) <= tiles.most_tall_tiles(rows, used, group)
    longest = int(contexts[found.short[:, 2]].max(initial=0))
    assert found.chunks <= tiles.most_chunks(longest)


@given(SEQUENCES, GROUPS)
def test_tiles_of_a_sequence_do_not_depend_on_the_others(
    sequences: list[tuple[int, int | None]], group: int
) -> None:
    starts, _, together = plan(sequences, group)
    for s, sequence in enumerate(sequences):
        _, _, alone = plan([sequence], group)
        for kind, own in ((together.short, alone.short), (together.tall, alone.tall)):
            moved = kind[kind[:, 2] == s] - np.array([starts[s], 0, s, 0, 0])
            assert np.array_equal(moved, own)


@given(st.integers(1, 2**31 - 1))
def test_chunks_hold_the_context(context: int) -> None:
    (length,) = tiles.chunk_lengths(np.array([context], np.int32)).tolist()
    assert length * tiles.MOST_CHUNKS >= context
    assert length == tiles.CHUNK or length // 2 * tiles.MOST_CHUNKS < context
    assert -(-context // length) <= tiles.most_chunks(context)


@given(GROUPS)
def test_a_tile_holds_at_least_one_row(group: int) -> None:
    for is_short in (True, False):
        rows = tiles.height(group, is_short=is_short)
        assert rows >= group
        assert rows & (rows - 1) == 0
