"""The decoder for CUDA in Triton's interpreter equals the one in torch for every family's features.

Few variants show every feature once, since the interpreter is slow: see `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda.recorded import record
from families import variants
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder import forward
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.cuda.graphs import GraphSizes
from loraplex_model.decoder.reference import ReferenceDecoder
from model.changes import random_adapter, random_prompt
from model.passes import token_ids

BLOCKS, BLOCK_SIZE, LAYERS = 64, 4, 2

VARIANTS = (
    "gemma2-strong-caps",  # 1 + w, norms of outputs, GELU, scaled embeddings, capped scores, logits
    "gemma3",  # norms of heads with 1 + w, a rotation for each kind of layer
    "olmo2",  # no norms of inputs, norms over all heads
    "cohere",  # LayerNorm without bias, a weight for every head, parallel blocks, pairs side by side
    "stablelm-parallel",  # LayerNorm with bias, a part of a head rotated
    "starcoder2",  # an MLP without a gate, biases everywhere
    "phi4-mini",  # LongRoPE, joined modules
    "ministral3",  # queries scaled by position
    "smollm3-window-bias",  # layers without positions
    "granite",  # factors on blocks' outputs, scores and logits
    "glm4",  # pairs side by side in a part of a head, norms of inputs and outputs
)
KINDS = ("lora", "norms", "bottlenecks", "everything")
MIXES: tuple[Mix, ...] = ((), *(((slot, 1.0),) for slot in range(len(KINDS))))
PROMPT = len(KINDS)  # slot of an adapter with virtual tokens

Load = Callable[..., BaseWeights]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """`(variant, dtype) -> BaseWeights`, of the first layers."""
    root: Path = tmp_path_factory.mktemp("families")

    def load(variant: str, dtype: torch.dtype = torch.float32) -> BaseWeights:
        directory = root / variant
        if not directory.exists():
            variants.write(variant, directory)
        weights = load_base(str(directory), dtype, root / "cache").weights
        config = replace(
            weights.config,
            num_layers=LAYERS,
            sliding_windows=weights.config.sliding_windows[:LAYERS],
            layer_ropes=weights.config.layer_ropes[:LAYERS],
        )
        return replace(weights, config=config, layers=weights.layers[:LAYERS])

    return load


def opened(kind: Any, weights: BaseWeights) -> Any:
    """A decoder with an adapter of each kind, whose cache is full of NaN."""
    decoder = kind(weights, BLOCKS, BLOCK_SIZE, len(KINDS) + 1)
    config, dtype = weights.config, weights.embed.dtype
    for slot, name in enumerate(KINDS):
        decoder.table.publish(slot, pack(random_adapter(name, config, seed=slot), dtype))
    decoder.table.publish(PROMPT, pack(random_prompt(config, 2, seed=9), dtype))
    for cache in (*decoder.keys, *decoder.values):
        cache.fill_(float("nan"))
    return decoder


on_cuda = partial(CudaDecoder, max_positions=64, max_rows=64, max_draws=8)


def passes(vocab: int, count: int = len(MIXES)) -> list[ForwardBatch]:
    """A sequence for each mix: chunks of prompts, some long for their family, then a new token.

    The last sequence begins with virtual tokens.
    """
    lengths = [11, 9, 9, 9, 9][:count]
    found = []
    for first, end in ((0, 5), (5, None), (None, None)):
        rows, wanted, used = [], [], 0
        for s, length in enumerate(lengths):
            ids = token_ids(s, length + 1, 96)
            ids[:2] = [3, 17]  # the rows that an adapter changes
            part = ids[first:end] if first is not None else ids[length:]
            part = part if end is not None or first is None else part[:-1]
            at = length if first is None else first
            blocks = list(range(s * 4, s * 4 + 4))
            rows.append((part, at, blocks, MIXES[s]))
            wanted += [used, used + len(part) - 1]
            used += len(part)
        if first == 0 and count == len(MIXES):
            rows.append(([vocab, vocab + 1, 5], 0, [60], ((PROMPT, 1.0),)))
            wanted += [used + 1, used + 2]
        is_long = [s % 2 == 0 for s in range(len(rows))]
        found.append(ForwardBatch.build(rows, sorted(set(wanted)), is_long))
    return found


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_adapter_on_every_family_equals_the_reference(
    variant: str, load: Load
) -> None:
    weights = load(variant)
    reference, other = (opened(kind, weights) for kind in (ReferenceDecoder, on_cuda))
    for batch in passes(weights.config.vocab_size):
        wanted = reference.forward(batch)
        assert wanted.isfinite().all()
        assert distance(other.forward(batch), wanted) <= 2e-5


@pytest.mark.parametrize("variant", ["gemma3", "stablelm-parallel"])
def test_bfloat16_is_rounded_where_the_reference_rounds(
    variant: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load(variant, torch.bfloat16)
    batches = passes(weights.config.vocab_size)[:2]
    wanted = [opened(ReferenceDecoder, weights)]
    exact = [wanted[0].forward(batch) for batch in batches]
    found = [opened(on_cuda, weights)]
    ours = [found[0].forward(batch) for batch in batches]
    monkeypatch.setattr(forward, "activation_dtype", lambda stored: stored.dtype)
    again = opened(ReferenceDecoder, weights)
    rounded = [again.forward(batch) for batch in batches]
    for own, near, one in zip(ours, rounded, exact, strict=True):
        assert distance(own, one) <= 2 * distance(near, one) < 0.5


@pytest.mark.parametrize("variant", ["gemma2-strong-caps", "stablelm-parallel", "olmo2"])
def test_neighbours_change_no_bit(variant: str, load: Load) -> None:
    """A row of the base has neighbours whose norms and bottlenecks are computed in torch."""
    weights = load(variant)
    together, alone = (opened(on_cuda, weights) for _ in range(2))
    vocab = weights.config.vocab_size
    for batch, own in zip(passes(vocab), passes(vocab, 1), strict=True):
        found = together.forward(batch)[: len(own.logit_rows)]
        assert torch.equal(found, alone.forward(own))


def test_one_graph_computes_short_and_long_sequences(load: Load) -> None:
    """Which rotation a sequence has is read from device memory."""
    weights = load("phi4-mini")
    sizes = GraphSizes(8, rows=(4,), lines=1)
    graphs, eager = (
        on_cuda(weights, BLOCKS, BLOCK_SIZE, 1, graphs=sizes, capture=record),
        on_cuda(weights, BLOCKS, BLOCK_SIZE, 1),
    )
    found = []
    for is_long in ([False, True, True], [True, False, True], [False] * 3):
        rows = [([7], 20, list(range(s * 6, s * 6 + 6)), ()) for s in range(3)]
        batch = ForwardBatch.build(rows, is_long=is_long)
        for decoder in (graphs, eager):
            generator = torch.Generator().manual_seed(9)
            decoder._cache.copy_(torch.randn(decoder._cache.shape, generator=generator))
        found.append(graphs.forward(batch))
        assert torch.equal(found[-1], eager.forward(batch))
        assert torch.equal(graphs._cache, eager._cache)
    for s, differs in enumerate([True, True, False]):
        assert torch.equal(found[0][s], found[1][s]) is not differs
