"""What a step costs the host: one copy in, one copy out, one wait, and few launches a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gpu.launches import Watched, watched
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.base.batch import ForwardBatch, Mix
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.cuda.decoder import CudaDecoder
from loraplex_model.decoder.cuda.draws import DrawTable
from model.changes import KINDS, random_adapter, random_prompt

from model import tiny

BLOCKS, BLOCK_SIZE, ADAPTERS = 80, 16, 64
MOST_LAUNCHES = 18


class Draw:
    """Parameters of a draw by temperature and top-p."""

    temperature, top_k, top_p, min_p, uniform = 0.8, 0, 0.9, 0.0, 0.3
    repetition_penalty, presence_penalty, frequency_penalty, pending = 1.0, 0.0, 0.0, -1
    seen = counted = np.empty(0, np.int32)
    counts = np.empty(0, np.float32)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("steps")
    checkpoint = tiny.write("qwen3", folder / "model")
    return load_base(str(checkpoint), torch.float32, folder / "cache").weights


def shallow(weights: Any, layers: int) -> Any:
    config = replace(
        weights.config,
        num_layers=layers,
        sliding_windows=weights.config.sliding_windows[:layers],
    )
    return replace(weights, config=config, layers=weights.layers[:layers])


def lora(weights: Any) -> AdapterDelta:
    shapes = weights.config.projection_shapes().items()
    return AdapterDelta({
        (layer, name): ProjectionDelta(a=torch.ones(2, fan_in), b=torch.ones(2, out))
        for layer in range(weights.config.num_layers)
        for name, (fan_in, out) in shapes
    })  # fmt: skip


def make(weights: Any, adapters: int) -> CudaDecoder:
    decoder = CudaDecoder(
        weights, BLOCKS, BLOCK_SIZE, 80, max_positions=600, max_rows=ADAPTERS, max_draws=ADAPTERS
    )
    for slot in range(adapters):
        decoder.table.publish(slot, pack(lora(weights), torch.float32))
    decoder.start(decode([()]))  # the table's entries go to the device once
    return decoder


def decode(mixes: list[Mix], done: int = 0) -> ForwardBatch:
    """A new token for each mix; the first is at position `done`, the others are at 0."""
    rows = []
    for i, mix in enumerate(mixes):
        at = 0 if i else done
        rows.append(([5], at, list(range(at // BLOCK_SIZE + 1)), mix))
    return ForwardBatch.build(rows)


def counts(decoder: CudaDecoder) -> tuple[int, int, int]:
    transfers = decoder.transfers
    return transfers.copies_in, transfers.copies_out, transfers.synchronisations


def per_layer(loaded: Any, adapters: int, batch: ForwardBatch) -> int:
    """Launches that a pass of two layers has beyond those of a pass of one."""
    seen: list[Watched] = []
    for layers in (1, 2):
        decoder = make(shallow(loaded, layers), adapters)
        with watched() as one:
            decoder.start(batch)
        assert one.waits == []
        seen.append(one)
    return len(seen[1].launches) - len(seen[0].launches)


def test_launches_of_a_layer_do_not_grow_with_the_adapters(loaded: Any) -> None:
    """With a context of several chunks, which another launch adds up, so that it is the most."""
    base = per_layer(loaded, 0, decode([()] * 4, 300))
    one = per_layer(loaded, 1, decode([((0, 1.0),)] * 4, 300))
    every = per_layer(loaded, ADAPTERS, decode([((s, 1.0),) for s in range(ADAPTERS)], 300))
    assert base < one == every <= MOST_LAUNCHES
    assert per_layer(loaded, 1, decode([((0, 1.0),)] * 4)) == one - 1


def test_the_counter_sees_launches_waits_and_copies_from_lists() -> None:
    x = torch.ones(4)
    with watched() as seen:
        (x + 1).sum().item()
        x[x > 0]
        torch.tensor([1.0])
        x.view(2, 2)
    assert seen.launches == ["add", "sum", "gt"]
    assert seen.waits == ["_local_scalar_dense", "index", "lift_fresh"]


def test_a_step_has_one_copy_in_one_copy_out_and_one_wait(loaded: Any) -> None:
    decoder = make(shallow(loaded, 1), 3)
    batch = decode([((0, 1.0),), (), ((1, 0.5), (2, 0.5))])
    before = counts(decoder)
    decoder.forward(batch)
    assert [after - b for after, b in zip(counts(decoder), before, strict=True)] == [1, 1, 1]

    before = counts(decoder)
    draws = DrawTable.of([Draw(), Draw(), Draw()], np.arange(3, dtype=np.int32))  # type: ignore[list-item]
    with watched() as seen:
        ticket = decoder.launch(batch, draws, np.empty(0, np.int32))
    assert seen.waits == []
    ticket.wait()
    assert [after - b for after, b in zip(counts(decoder), before, strict=True)] == [1, 1, 1]


def test_no_kind_of_adapter_makes_the_host_wait(loaded: Any) -> None:
    """Changed norms, bottlenecks, embeddings, heads, virtual tokens and merged copies included."""
    weights = shallow(loaded, 1)
    decoder = CudaDecoder(weights, BLOCKS, BLOCK_SIZE, len(KINDS) + 2, max_rows=64, max_draws=4)
    config = weights.config
    for slot, kind in enumerate(KINDS):
        decoder.table.publish(slot, pack(random_adapter(kind, config, slot), torch.float32))
    prompt = pack(random_prompt(config, 3, seed=1), torch.float32)
    decoder.table.publish(len(KINDS), prompt)
    merged = pack(random_adapter("everything", config, 1), torch.float32)
    decoder.table.publish(len(KINDS) + 1, merged)
    decoder.table.publish_merge(len(KINDS) + 1, decoder.merge(merged, torch.float32))
    rows = [([3, 17], 0, [slot], ((slot, 1.0),)) for slot in range(len(KINDS) + 2)]
    rows.append(([config.vocab_size, config.vocab_size + 2], 0, [60], ((len(KINDS), 1.0),)))
    batch = ForwardBatch.build(rows)
    batch = replace(batch, copies=np.array([[70, 71], [72, 73]], np.int32))
    decoder.start(batch)
    before = counts(decoder)
    with watched() as seen:
        decoder.start(batch)
    assert seen.waits == []
    assert [after - b for after, b in zip(counts(decoder), before, strict=True)] == [1, 0, 0]
