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
    "cohere",  # LayerNorm, a weight for every head, parallel blocks, pairs side by side
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
    """`(variant, dtype) -> BaseWeights`, of the last layers.

    Factors on queries begin within the length of the tests' sequences.
    """
    root: Path = tmp_path_factory.mktemp("families")

    def load(variant: str, dtype: torch.dtype = torch.float32) -> BaseWeights:
        directory = root / variant
        if not directory.exists():
            variants.write(variant, directory)
        weights = load_base(str(directory), dtype, root / "cache").weights
        config = replace(
            weights.config,
            num_layers=LAYERS,
            sliding_windows=weights.config.sliding_windows[-LAYERS:],
            layer_ropes=weights.config.layer_ropes[-LAYERS:],
            query_scale=(0.3, 4.0) if weights.config.query_scale else (),
        )
        return replace(weights, config=config, layers=weights.layers[-LAYERS:])

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
    """A sequence for each of the first mixes: chunks of prompts, then a new token.

    Every second sequence is long for its family. With all mixes there is one of virtual tokens too.
    """
    found = []
    for span in (slice(0, 5), slice(5, -1), slice(-1, None)):
        rows: list[tuple[list[int], int, list[int], Mix]] = []
        wanted: list[int] = []
        used = 0
        for s, mix in enumerate(MIXES[:count]):
            ids = [3, 17, *token_ids(s, 8 if s else 10, 96)]  # 3 and 17 are changed by adapters
            first = range(len(ids))[span].start
            rows.append((ids[span], first, list(range(s * 4, s * 4 + 4)), mix))
            wanted += [used, used + len(ids[span]) - 1]
            used += len(ids[span])
        if span.start == 0 and count == len(MIXES):
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

    def logits(kind: Any) -> list[torch.Tensor]:
        decoder = opened(kind, weights)
        return [decoder.forward(batch) for batch in batches]

    exact, ours = logits(ReferenceDecoder), logits(on_cuda)
    monkeypatch.setattr(forward, "activation_dtype", lambda stored: stored.dtype)
    for found, near, wanted in zip(ours, logits(ReferenceDecoder), exact, strict=True):
        assert distance(found, wanted) <= 2 * distance(near, wanted) < 0.5


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
