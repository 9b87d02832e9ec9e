"""Paged attention in Triton's interpreter, against float64; unused keys and scratch hold NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from loraplex_model.decoder.attention import Scoring
from loraplex_model.decoder.cuda import tiles
from loraplex_model.decoder.cuda.kernels import attention

NAN = float("nan")
PADDING = 2  # tiles past the count, and columns past the longest block table


@dataclass(frozen=True)
class Heads:
    """Shape of the cache and of the query heads."""

    count: int = 4
    kv: int = 2
    width: int = 64
    block_size: int = 32


@dataclass
class Cache:
    """Keys and values of whole sequences, and the paged copy that the kernels read."""

    dense: list[tuple[torch.Tensor, torch.Tensor]]  # [length, kv, width] twice for each sequence
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def of(cls, heads: Heads, lengths: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Cache:
        """Blocks are scattered; the slots past each length and all other blocks hold NaN."""
        random = torch.Generator().manual_seed(seed)
        size = heads.block_size
        blocks = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(blocks) + 3, generator=random).split([*blocks, 3])
        shape = (sum(blocks) + 3, heads.kv, size, heads.width)
        keys, values = torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)
        tables = torch.full((len(lengths), max(blocks) + PADDING), -(2**30), dtype=torch.int32)
        dense = []
        for s, length in enumerate(lengths):
            tables[s, : blocks[s]] = order[s]
            pair = [
                torch.randn(length, heads.kv, heads.width, generator=random).to(dtype)
                for _ in range(2)
            ]
            for own, cache in zip(pair, (keys, values), strict=True):
                for block, part in zip(order[s], own.split(size), strict=True):
                    cache[block, :, : len(part)] = part.transpose(0, 1)
            dense.append((pair[0], pair[1]))
        return cls(dense, keys, values, tables)


def device_tiles(fields: np.ndarray, chunks: int = 0) -> attention.DeviceTiles:
    """Tiles with padding that would be out of bounds if it were read."""
    padding = np.full((PADDING, tiles.FIELDS), -(2**30), np.int32)
    padded = torch.from_numpy(np.concatenate([fields, padding]))
    return attention.DeviceTiles(padded, torch.tensor([len(fields)], dtype=torch.int32), chunks)


def attend(
    cache: Cache,
    q: torch.Tensor,
    counts: Sequence[int],
    contexts: Sequence[int],
    window: int | None,
    more_chunks: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The kernels' result for `counts` new tokens of each sequence; rows in no tile stay NaN."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    group = q.shape[1] // cache.keys.shape[1]
    plan = tiles.plan_tiles(starts, np.asarray(contexts, np.int32), group)
    out = torch.full_like(q, NAN)
    scoring = Scoring(window, scale or q.shape[2] ** -0.5, softcap)
    if len(plan.short):
        short = device_tiles(plan.short, plan.chunks + more_chunks)
        size = attention.scratch_floats(len(short.fields), short.chunks, *q.shape[1:])
        attention.attend_short(
            q,
            cache.keys,
            cache.values,
            cache.tables,
            short,
            torch.full((size,), NAN),
            out,
            scoring,
        )
    tall = device_tiles(plan.tall)
    attention.attend_tall(q, cache.keys, cache.values, cache.tables, tall, out, scoring)
    return out


def expected(
    cache: Cache,
    q: torch.Tensor,
    counts: Sequence[int],
    contexts: Sequence[int],
    window: int | None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The same in float64, sequence by sequence."""
    parts = []
    for own, context, (keys, values) in zip(
        q.split(list(counts)), contexts, cache.dense, strict=True
    ):
        group = q.shape[1] // keys.shape[1]
        k, v = (t[:context].double().repeat_interleave(group, dim=1) for t in (keys, values))
        scores = torch.einsum("nhd,mhd->hnm", own.double(), k)
        scores *= scale or q.shape[2] ** -0.5
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        at = torch.arange(context)
        position = torch.arange(context - len(own), context)[:, None]
        hidden = at > position
        if window is not None:
            hidden |= at <= position - window
        parts.append(
            torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        )
    return torch.cat(parts)


def queries(heads: Heads, rows: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, heads.count, heads.width, generator=random)).to(dtype)


def check(
    heads: Heads,
    counts: Sequence[int],
    contexts: Sequence[int],
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    **scoring: float,
) -> None:
    cache = Cache.of(heads, contexts, dtype)
    q = queries(heads, sum(counts), dtype)
    out = attend(cache, q, counts, contexts, window, **scoring)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    wanted = expected(cache, q, counts, contexts, window, **scoring)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


GROUPS = [Heads(2, 2), Heads(9, 3), Heads(8, 2), Heads(16, 2), Heads(16, 1)]
LENGTHS = [1, 31, 32, 33, 65, 256, 257, 600]


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_decode_rows(heads: Heads) -> None:
    check(heads, [1] * len(LENGTHS), LENGTHS)


@pytest.mark.parametrize("window", [1, 32, 100, 256, 1000])
def test_decode_rows_with_a_window(window: int) -> None:
    check(Heads(), [1] * len(LENGTHS), LENGTHS, window)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_prompts_and_chunks_of_prompts(heads: Heads) -> None:
    check(heads, [2, 33, 5, 70], [2, 33, 140, 300])


@pytest.mark.parametrize("window", [1, 7, 64, 90])
def test_prompts_with_a_window(window: int) -> None:
    check(Heads(), [2, 33, 5, 70], [2, 33, 140, 300], window)


@pytest.mark.parametrize(
    "heads",
    [
        Heads(4, 2, 64, 16),
        Heads(4, 2, 80, 48),
        Heads(4, 2, 128, 256),
        Heads(2, 1, 256),
        Heads(2, 2, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_widths_blocks_and_types_in_mixed_passes(heads: Heads, dtype: torch.dtype) -> None:
    check(heads, [1, 40, 1, 3], [300, 90, 17, 3], dtype=dtype)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_capped_scores_with_a_scale_of_their_own(softcap: float, window: int | None) -> None:
    """In one and in several chunks, and in tiles of prompts; the cap is far below most scores."""
    check(Heads(), [1, 1, 40], [300, 17, 90], window, scale=0.7, softcap=softcap)


def test_a_score_beyond_the_range_of_powers_is_capped() -> None:
    heads = Heads(2, 1, 16)
    cache = Cache.of(heads, [40, 40], torch.float32)
    q = 1e6 * queries(heads, 3, torch.float32)
    found = attend(cache, q, [1, 2], [40, 40], None, softcap=2.0)
    wanted = expected(cache, q, [1, 2], [40, 40], None, softcap=2.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1024])
def test_long_contexts(window: int | None) -> None:
    check(Heads(3, 1), [1, 1, 2], [4097, 1025, 2000], window)


def test_a_context_whose_chunks_are_longer() -> None:
    length = tiles.CHUNK * tiles.MOST_CHUNKS + 1
    assert tiles.chunk_lengths(np.array([length - 1, length])).tolist() == [256, 512]
    check(Heads(2, 1, 16), [1], [length])


@pytest.mark.parametrize("window", [None, 50])
def test_neighbours_and_more_chunks_change_no_bit(window: int | None) -> None:
    """Also a row's place in the pass and the room for chunks that a recorded graph has."""
    heads, contexts, counts = Heads(9, 3), [300, 513, 90, 260], [1, 1, 25, 60]
    cache = Cache.of(heads, contexts, torch.float32)
    q = queries(heads, sum(counts), torch.float32)
    together = attend(cache, q, counts, contexts, window, more_chunks=3)
    for s, part in enumerate(q.split(counts)):
        alone = Cache(cache.dense, cache.keys, cache.values, cache.tables[s : s + 1])
        own = attend(alone, part.contiguous(), [counts[s]], [contexts[s]], window)
        assert torch.equal(own, together.split(counts)[s])


@pytest.mark.parametrize("window", [None, 50])
def test_cuts_of_a_prompt_change_no_bit_unless_a_part_is_one_token(window: int | None) -> None:
    heads, length = Heads(8, 2), 150
    cache = Cache.of(heads, [length], torch.float32)
    q = queries(heads, length, torch.float32)
    whole = attend(cache, q, [length], [length], window)
    for cut in (2, 77, 128, 148):
        parts = zip(q.split([cut, length - cut]), (cut, length), strict=True)
        cut_up = [
            attend(cache, part.contiguous(), [len(part)], [end], window) for part, end in parts
        ]
        assert torch.equal(torch.cat(cut_up), whole)


def test_rows_of_padding_are_left_as_they_are() -> None:
    heads = Heads()
    cache = Cache.of(heads, [40, 300], torch.float32)
    q = queries(heads, 4, torch.float32)
    # rows 1 and 3 are padding, as in a recorded graph with fewer sequences than it has room for
    tables = torch.full((4, cache.tables.shape[1]), -(2**30), dtype=torch.int32)
    tables[[0, 2]] = cache.tables
    padded = Cache(cache.dense, cache.keys, cache.values, tables)
    out = attend(padded, q, [1] * 4, [40, 0, 300, 0], None)
    assert out[[1, 3]].isnan().all()
    torch.testing.assert_close(
        out[[0, 2]].double(),
        expected(cache, q[[0, 2]], [1, 1], [40, 300], None),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_state_that_is_not_finite_shows_in_the_result() -> None:
    """Sampling looks for rows that are not finite, so attention must not hide them."""
    heads = Heads()
    cache = Cache.of(heads, [300, 300], torch.float32)
    q = queries(heads, 2, torch.float32)
    q[0, 1] = NAN
    out = attend(cache, q, [1, 1], [300, 300], None)
    assert out[0, 1].isnan().all()
    assert out[1].isfinite().all()


def test_every_configuration_has_a_name_of_its_own() -> None:
    names = [compilation.name for compilation in attention.compilations()]
    assert len(set(names)) == len(names)
