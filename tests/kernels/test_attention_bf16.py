"""Attention in products of bfloat16: its values, and what a query's bits do not depend on."""

from __future__ import annotations

import ctypes
from ctypes import c_float
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from kernels.conftest import BF16_ISAS, SOFTWARE
from kernels.test_kernels import pointer
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder import paired
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.ops import build

from model import tiny

NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention over `tokens` positions."""

    group: int
    kv_heads: int
    head_dim: int
    tokens: int
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    mean: float = 0.0  # of the values

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


SHAPES = [
    Shape(3, 3, 64, 70),
    Shape(3, 1, 64, 270, block_size=32, mean=3),
    Shape(1, 2, 64, 530, window=270),  # three spans of positions; the window begins in the second
    Shape(4, 2, 128, 90, block_size=64),
    Shape(8, 1, 80, 70, window=33),
    Shape(9, 1, 96, 40, softcap=2),
    Shape(20, 1, 32, 50, window=7, softcap=30),  # heads of one query in two tiles
    Shape(2, 1, 256, 70, block_size=48),
    Shape(7, 1, 120, 37),
    Shape(2, 2, 8, 45, block_size=4, window=1),
    Shape(5, 2, 24, 75, block_size=2),
    Shape(1, 1, 7, 41, block_size=6, window=40),
]


class Context:
    """Random queries, keys and values of a sequence, and a cache of NaN for them."""

    def __init__(self, library: ctypes.CDLL, shape: Shape) -> None:
        torch.manual_seed(shape.tokens + shape.head_dim)
        self.library, self.shape = library, shape
        self.q = 2 * torch.randn(shape.tokens, shape.heads, shape.head_dim)
        self.keys = torch.randn(shape.tokens, shape.kv_heads, shape.head_dim).bfloat16()
        self.values = (torch.randn(self.keys.shape) + shape.mean).bfloat16()
        count = -(-shape.tokens // shape.block_size)
        self.blocks = torch.randperm(count + 2)[:count].int()
        forms = paired.shapes(shape.block_size, shape.head_dim)
        self.cached_keys, self.cached_values = (
            torch.full((count + 2, shape.kv_heads, *form), NAN, dtype=torch.bfloat16)
            for form in forms
        )

    def put(self, first: int, end: int) -> None:
        """Writes positions [first, end) to the cache, number by number as its form says."""
        j = torch.arange(first, end)[:, None, None]
        head = torch.arange(self.shape.kv_heads)[:, None]
        i = torch.arange(self.shape.head_dim)
        block, place = self.blocks.long()[j // self.shape.block_size], j % self.shape.block_size
        self.cached_keys[block, head, i // 2, place, i % 2] = self.keys[first:end]
        if self.shape.head_dim % 2:
            last = block[..., 0], head[:, 0], self.shape.head_dim // 2, place[..., 0], 1
            self.cached_keys[last] = 0
        self.cached_values[block, head, place // 2, i, place % 2] = self.values[first:end]

    def attend(self, first: int, end: int) -> torch.Tensor:
        """Attention of the queries at positions [first, end): [end - first, heads, head_dim]."""
        shape, q = self.shape, self.q[first:end].contiguous()
        positions = torch.arange(first, end, dtype=torch.int32)
        out = torch.full(q.shape, NAN)
        self.library.loraplex_attention_bf16(
            pointer(q),
            pointer(self.cached_keys),
            pointer(self.cached_values),
            pointer(self.blocks),
            shape.block_size,
            shape.kv_heads,
            shape.head_dim,
            shape.heads,
            pointer(positions),
            end - first,
            shape.window,
            c_float(shape.scale),
            c_float(shape.softcap),
            pointer(out),
        )
        return out

    def whole(self) -> torch.Tensor:
        self.put(0, self.shape.tokens)
        return self.attend(0, self.shape.tokens)


def exact(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64 with queries rounded to bfloat16, and the bound on a result's error.

    Weights are rounded to 8 bits, each by at most 2^-8 of itself, and divided by their own sum: the
    output moves by at most 2^-8 sum p |v - output|. The remaining error is that of float32: scores
    of magnitude 10, exponentials within 3e-6, and sums; together below 2e-5 sum p |v|.
    """
    shape = context.shape
    q = context.q.bfloat16().double()
    keys, values = (
        x.double().repeat_interleave(shape.group, 1) for x in (context.keys, context.values)
    )
    scores = torch.einsum("qhd,khd->hqk", q, keys) * shape.scale
    if shape.softcap:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    distance = torch.arange(shape.tokens)[:, None] - torch.arange(shape.tokens)
    hidden = (distance < 0) | (distance >= (shape.window or shape.tokens))
    p = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    out = torch.einsum("hqk,khd->qhd", p, values)
    bound = torch.empty_like(out)
    for i in range(shape.head_dim):  # [heads, queries, keys] at once
        column = values[:, :, i].T[:, None]
        spread = (p * (column - out[:, :, i].T[:, :, None]).abs()).sum(-1)
        bound[:, :, i] = (2**-8 * 1.01 * spread + 2e-5 * (p * column.abs()).sum(-1)).T
    return out, bound


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_float64(bf16_library: ctypes.CDLL, shape: Shape) -> None:
    context = Context(bf16_library, shape)
    got = context.whole().double()
    want, bound = exact(context)
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_chunks(bf16_library: ctypes.CDLL, shape: Shape) -> None:
    """Whatever is not computed yet is NaN in the cache, as are other sequences' blocks (R6)."""
    whole = Context(bf16_library, shape).whole()
    for size in (1, 11, 64):
        context = Context(bf16_library, shape)
        parts = []
        for first in range(0, shape.tokens, size):
            end = min(first + size, shape.tokens)
            context.put(first, end)
            parts.append(context.attend(first, end))
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bad_position_reaches_only_queries_that_see_it(
    bf16_library: ctypes.CDLL, shape: Shape, bad: float
) -> None:
    whole = Context(bf16_library, shape).whole()
    context = Context(bf16_library, shape)
    at = shape.tokens // 2
    context.keys[at], context.values[at] = NAN, bad
    poisoned = context.whole()
    seen = torch.zeros(shape.tokens, dtype=torch.bool)
    seen[at : at + shape.window if shape.window else shape.tokens] = True
    assert not poisoned[seen].isfinite().any()
    assert torch.equal(poisoned[~seen], whole[~seen])


@pytest.mark.parametrize("isa", BF16_ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_instructions_give_the_bits_of_the_software_version(isa: str, shape: Shape) -> None:
    hardware = build.load(isa)
    software = build.load(*SOFTWARE[hardware.loraplex_bf16_order() - 1])
    assert torch.equal(Context(hardware, shape).whole(), Context(software, shape).whole())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefixes_are_written_in_the_form_of_the_cache(shape: Shape) -> None:
    library = ctypes.CDLL(None)
    by_number, at_once = Context(library, shape), Context(library, shape)
    by_number.put(0, shape.tokens)
    caches = at_once.cached_keys, at_once.cached_values
    paired.write(at_once.blocks.tolist(), at_once.keys, at_once.values, *caches)
    expected = by_number.cached_keys, by_number.cached_values
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("variant", ["llama-odd-sizes", "mistral-window"])
def test_blocks_and_chunks_change_no_bit_of_a_pass(
    bf16_library: ctypes.CDLL, variant: str, tmp_path: Path
) -> None:
    checkpoint = tiny.write(variant, tmp_path / "model")
    weights = load_base(str(checkpoint), torch.bfloat16, tmp_path / "cache").weights
    ids = torch.randint(3, tiny.VOCAB, (61,), generator=torch.Generator().manual_seed(1)).tolist()
    results = []
    for block_size, sizes in ((4, [61]), (16, [7, 54]), (16, [1] * 61), (32, [40, 1, 1, 19])):
        count = -(-len(ids) // block_size)
        decoder = NativeDecoder(weights, count + 1, block_size, 1, threads=2, library=bf16_library)
        for cache in (*decoder.keys, *decoder.values):
            cache.fill_(NAN)
        blocks, logits, first = list(range(count, 0, -1)), [], 0
        for size in sizes:
            rows = list(range(size))
            batch = ForwardBatch.build([(ids[first : first + size], first, blocks, ())], rows)
            logits.append(decoder.forward(batch))
            first += size
        results.append(torch.cat(logits))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_pairs_of_positions_need_even_blocks() -> None:
    with pytest.raises(AssertionError, match="pair"):
        paired.shapes(replace(SHAPES[0], block_size=5).block_size, 64)
