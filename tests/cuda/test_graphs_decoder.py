"""Passes by recorded launches equal passes launched kernel by kernel, whatever was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda.recorded import record
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.cuda.draws import DrawTable
from loraplex_model.decoder.cuda.graphs import GraphSizes
from loraplex_model.decoder.cuda.step import passes
from model.passes import token_ids

from model import tiny

BLOCKS, BLOCK_SIZE, SLOTS, MOST_RANK = 40, 16, 70, 16
SIZES = GraphSizes(MOST_RANK, rows=(2, 8, 66), lines=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("graphs")
    checkpoint = tiny.write("qwen3-window-bias", folder / "model")
    loaded = load_base(str(checkpoint), torch.float32, folder / "cache").weights
    config = replace(loaded.config, num_layers=1, sliding_windows=loaded.config.sliding_windows[:1])
    return replace(loaded, config=config, layers=loaded.layers[:1])


def lora(weights: Any, seed: int, rank: int = 4) -> AdapterDelta:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=random)

    return AdapterDelta({
        (0, name): ProjectionDelta(a=normal(rank, fan_in), b=normal(rank, out), bias=normal(out))
        for name, (fan_in, out) in weights.config.projection_shapes().items()
    })  # fmt: skip


def make(weights: Any, **options: Any) -> CudaDecoder:
    return CudaDecoder(
        weights, BLOCKS, BLOCK_SIZE, SLOTS, max_positions=64, max_rows=8, max_draws=66, **options
    )


@pytest.fixture(scope="module")
def pair(weights: Any) -> Iterator[tuple[CudaDecoder, CudaDecoder]]:
    """A decoder with graphs, recorded without any adapter, and one without graphs."""
    # Numbers behind those that a pass has are poison: a kernel that reads one fails or is wrong.
    original = passes.PassShape.layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.PassShape, "layout", lambda self: original(self, unread=0x7F7F7F7F))
        graphs, eager = make(weights, graphs=SIZES, capture=record), make(weights)
        for slot in range(SLOTS):
            rank = 20 if slot == SLOTS - 1 else 1 + slot % MOST_RANK
            adapter = pack(lora(weights, slot, rank), torch.float32)
            for decoder in (graphs, eager):
                decoder.table.publish(slot, adapter)
        yield graphs, eager


def decode(mixes: list[Mix], done: int = 0, seed: int = 1) -> ForwardBatch:
    """One new token for each mix, at position `done`; sequences may share blocks they only read."""
    ids = token_ids(seed, len(mixes), tiny.VOCAB)
    return ForwardBatch.build(
        [([ids[i]], done, [i % BLOCKS, (i + 1) % BLOCKS], mix) for i, mix in enumerate(mixes)]
    )


def spoil(decoder: CudaDecoder) -> None:
    """Fills everything that a pass must write before it reads it."""
    assert decoder.graphs is not None
    for tensor in (*decoder._space.tensors, decoder.graphs._logits, decoder.graphs._lines):
        tensor.fill_(float("nan"))


def same(pair: tuple[CudaDecoder, CudaDecoder], batch: ForwardBatch, is_graph: bool = True) -> None:
    graphs, eager = pair
    for decoder in pair:
        generator = torch.Generator().manual_seed(9)
        decoder._cache.copy_(torch.randn(decoder._cache.shape, generator=generator))
    spoil(graphs)
    assert graphs.graphs is not None
    launch, results = graphs.graphs.launch, []

    def watched(plan: passes.PassPlan) -> Any:
        results.append(launch(plan))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.graphs, "launch", watched)
        found = graphs.forward(batch)
    assert [result is not None for result in results] == [is_graph]
    wanted = eager.forward(batch)
    assert wanted.isfinite().all()
    assert torch.equal(found, wanted)
    assert torch.equal(graphs._cache, eager._cache)


def test_without_a_capture_passes_are_launched_kernel_by_kernel(
    weights: Any, pair: tuple[CudaDecoder, CudaDecoder], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(body: Callable[[], None]) -> Any:
        body()
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = make(weights, graphs=SIZES, capture=refuse)
    assert decoder.graphs is None
    assert "not permitted" in caplog.text
    batch = decode([()] * 2)
    assert torch.equal(decoder.forward(batch), pair[1].forward(batch))


def test_recorded_without_adapters_and_repeated_with_sixty_four(
    pair: tuple[CudaDecoder, CudaDecoder],
) -> None:
    same(pair, decode([((slot, 1.0),) for slot in range(64)]))


@pytest.mark.parametrize(("rows", "done"), [(1, 0), (2, 20), (3, 20), (8, 0)])
def test_every_bucket_with_and_without_adapters(
    pair: tuple[CudaDecoder, CudaDecoder], rows: int, done: int
) -> None:
    same(pair, decode([()] * rows, done))
    mixes: list[Mix] = [((0, 0.5), (5, -1.0)), (), ((9, 1.0),)] * 3
    same(pair, decode(mixes[:rows], done))


def test_adapters_come_and_go_between_repetitions(
    pair: tuple[CudaDecoder, CudaDecoder], weights: Any
) -> None:
    """The recorded launches keep reading the table, where the new adapter's addresses are."""
    batch = decode([((3, 1.0),), ((4, 1.0),)])
    before = pair[0].forward(batch)
    old = pair[0].table.adapters[3]
    assert old is not None
    for decoder in pair:
        decoder.table.remove(3)
        decoder.table.publish(3, pack(lora(weights, 99, rank=16), torch.float32))
    same(pair, batch)
    after = pair[0].forward(batch)
    assert not torch.equal(after[0], before[0])
    for decoder in pair:
        decoder.table.remove(3)
        decoder.table.publish(3, old)
    same(pair, batch)


def test_what_fits_no_graph_is_launched_kernel_by_kernel(
    pair: tuple[CudaDecoder, CudaDecoder],
) -> None:
    prompt = ForwardBatch.build([([5, 6, 7], 0, [0], ()), ([8], 4, [1], ((0, 1.0),))])
    same(pair, prompt, is_graph=False)
    same(pair, decode([((SLOTS - 1, 1.0),)]), is_graph=False)  # its rank is larger than any graph's
    every: Mix = tuple((slot, 0.1) for slot in range(SLOTS - 1))
    same(pair, decode([every, every]), is_graph=False)  # more adapters than there is room for
    copied = replace(decode([()], 4), copies=np.array([[7, 0]], np.int32))
    same(pair, copied, is_graph=False)


def test_a_small_pass_uses_a_small_graph(pair: tuple[CudaDecoder, CudaDecoder]) -> None:
    graphs = pair[0].graphs
    assert graphs is not None

    def shape(batch: ForwardBatch) -> passes.PassShape:
        plan = passes.plan_pass(batch, pair[0].table, group=2, block_size=BLOCK_SIZE, vocab=128)
        found = graphs.shape_for(plan)
        assert found is not None
        return found

    assert [shape(decode([()] * n)).rows for n in (1, 2, 3, 8, 9, 66)] == [2, 2, 8, 8, 66, 66]
    assert shape(decode([()])).lora is None
    assert shape(decode([((0, 1.0),)])).lora is not None
    many: Mix = tuple((slot, 0.1) for slot in range(5))
    assert shape(decode([many, many])).rows == 8  # the smallest with room for ten adapters


class Greedy:
    """Parameters of a draw that takes the largest logit."""

    temperature, top_k, top_p, min_p, uniform = 0.0, 0, 1.0, 0.0, 0.0
    repetition_penalty, presence_penalty, frequency_penalty, pending = 1.0, 0.0, 0.0, -1
    seen = counted = np.empty(0, np.int32)
    counts = np.empty(0, np.float32)


def test_tokens_are_drawn_and_read_by_the_next_pass(
    pair: tuple[CudaDecoder, CudaDecoder],
) -> None:
    """Two passes under way at once; the second's token is known to the device alone."""
    first = decode([(), ((2, 1.0),), ()])
    second = replace(decode([(), ((2, 1.0),)], done=1), tokens=np.array([-2, -1], np.int32))
    for decoder in pair:
        draws = DrawTable.of([Greedy(), Greedy()], np.array([0, 2], np.int32))  # type: ignore[list-item]
        logits = decoder.forward(first)
        ticket = decoder.launch(first, draws, np.array([1], np.int32))
        again = DrawTable.of([Greedy()], np.array([1], np.int32))  # type: ignore[list-item]
        behind = decoder.launch(second, again, np.array([0, 1], np.int32))
        tokens, lines, states = ticket.wait()
        assert not len(states)
        assert tokens.tolist() == [int(logits[0].argmax()), int(logits[2].argmax())]
        assert torch.equal(torch.from_numpy(lines), logits[1:2])
        chosen, behind_lines, _ = behind.wait()
        known = replace(second, tokens=tokens[[1, 0]])
        wanted = decoder.forward(known)
        assert torch.equal(torch.from_numpy(behind_lines), wanted)
        assert chosen.tolist() == [int(wanted[1].argmax())]


def test_warming_up_changes_nothing(pair: tuple[CudaDecoder, CudaDecoder]) -> None:
    decoder = pair[1]
    before, tokens = decoder._cache.clone(), decoder.last_tokens.clone()
    decoder.warm_up(2, MOST_RANK)
    assert torch.equal(decoder._cache, before)
    assert torch.equal(decoder.last_tokens, tokens)
