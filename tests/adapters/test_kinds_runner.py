"""From a directory that PEFT wrote to logits, through the engine's runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from adapters.peft_files import TIED
from adapters.peft_kinds import BASE, Gallery, ids_of, names_on
from loraplex_adapters.format.examine import inspect
from loraplex_model.base.batch import ForwardBatch
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, ReadAdapter, build

KV_TOKENS, VIRTUAL_TOKENS = 4096, 256


def start(gallery: Gallery) -> LocalRunner:
    return build(
        RunnerConfig(
            model=str(gallery.checkpoint(TIED)),
            dtype="float32",
            device="cpu",
            threads=1,
            cache="var/cache",
            max_context=0,
            kv_tokens=KV_TOKENS,
            kv_memory=0,
            adapter_memory=1 << 24,
            max_rank=128,
            virtual_tokens=VIRTUAL_TOKENS,
            max_virtual_tokens=16,
        )
    )


def read(runner: LocalRunner, directory: Path) -> ReadAdapter:
    spec = inspect(directory, runner.info.base)
    adapter = runner.read_adapter(AdapterRef(spec.digest, str(directory)))
    assert (adapter.nbytes, adapter.virtual_tokens) == (spec.packed_bytes, spec.virtual_tokens)
    return adapter


def test_a_batch_of_every_kind_equals_peft_row_by_row(gallery: Gallery) -> None:
    """Virtual tokens are computed at publication; two requests read the same blocks."""
    runner = start(gallery)
    size = runner.block_size
    set_aside = list(range(runner.num_blocks, runner.num_blocks + runner.prefix_blocks))
    free = list(range(runner.num_blocks))
    names = names_on(TIED)
    rows, copies, owners = [], [], []
    for slot, name in enumerate(names):
        adapter = read(runner, gallery.adapter(TIED, name))
        virtual = adapter.virtual_tokens
        shared = [set_aside.pop() for _ in range(-(-virtual // size))]
        runner.publish_adapter(slot, adapter, shared)
        for _ in range(2 if virtual else 1):
            own = [free.pop() for _ in range(-(-(virtual + len(ids_of(name))) // size))]
            own[: virtual // size] = shared[: virtual // size]
            if virtual % size:
                copies.append((shared[-1], own[virtual // size]))
            rows.append((ids_of(name), virtual, own, ((slot, 1.0),)))
            owners.append(name)
    rows.append((ids_of(BASE), 0, [free.pop()], ()))
    owners.append(BASE)
    assert len(copies) >= 8
    last = [len(ids) for ids, *_ in rows]
    batch = ForwardBatch.build(rows, list(range(sum(last))))
    batch = replace(batch, copies=np.array(copies, np.int32))
    for name, found in zip(owners, runner.forward(batch).split(last), strict=True):
        expected = gallery.expected(TIED, name)
        assert ((found - expected).abs() - 1e-5 * expected.abs()).max() <= 3e-5, name


def test_whatever_a_slot_held_leaves_nothing_in_it(gallery: Gallery) -> None:
    runner = start(gallery)
    lora = read(runner, gallery.adapter(TIED, "lora"))
    batch = ForwardBatch.build(
        [(ids_of(BASE), 0, [0, 1], ()), (ids_of("lora"), 0, [2, 3], ((0, 1.0),))]
    )
    before = None
    for name in names_on(TIED):
        runner.publish_adapter(0, lora, [])
        found = runner.forward(batch).clone()
        before = found if before is None else before
        assert torch.equal(found, before), f"after what stands before {name}"
        runner.remove_adapter(0)
        adapter = read(runner, gallery.adapter(TIED, name))
        runner.publish_adapter(0, adapter, [runner.num_blocks] * bool(adapter.virtual_tokens))
        assert torch.equal(runner.forward(batch)[0], before[0]), name
        runner.remove_adapter(0)
