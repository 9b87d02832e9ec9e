"""A runner whose adapters lie in an arena: moved and given back, with the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_files import everywhere, lora_config, lora_tensors, write_adapter
from loraplex_adapters.store import Store
from loraplex_model.adapters.delta import AdapterDelta, VirtualTokens
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.adapters.table import Merged
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.decoder.cuda.memory.arena import GRANULE, DeviceArena
from loraplex_model.decoder.cuda.memory.copies import DeviceAdapters
from loraplex_model.decoder.cuda.memory.pinned import PinnedArena
from loraplex_server.engine.messages import AdapterRef
from loraplex_server.engine.runner.adapter_memory import Moved
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import LocalRunner, ReadAdapter, build
from model.immediate_copies import ImmediateCopies

from model import tiny

RANKS = {"small": 1, "large": 8, "other": 2, "last": 8}


class ArenaMemory:
    """An `AdapterMemory` that treats host memory as a device of its own."""

    def __init__(self, nbytes: int) -> None:
        self.host = PinnedArena(1 << 22, lambda *_: None)
        self.arena = DeviceArena(nbytes, torch.device("cpu"))
        self._adapters = DeviceAdapters(self.arena, ImmediateCopies())
        self.aside_now = 0
        self.handed_over: list[Merged] = []

    def zeros(self, nbytes: int) -> torch.Tensor:
        assert self.aside_now, "an adapter is read among the passes"
        return self.host.zeros(nbytes)

    def prepare(self, adapter: PackedAdapter) -> bool:
        return self._adapters.prepare(adapter)

    def take(self, adapter: PackedAdapter, on_move: Moved) -> PackedAdapter:
        return self._adapters.take(adapter, on_move)

    def free(self, placed: PackedAdapter) -> None:
        placed.data.fill_(0xFF)  # NaN, in every type of weight
        self._adapters.free(placed)

    def aside(self) -> AbstractContextManager[None]:
        return self._aside()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self.aside_now += 1
        yield
        self.aside_now -= 1

    def hand_over(self, merged: Merged) -> None:
        self.handed_over.append(merged)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("model"))


def runner_of(checkpoint: Path, memory: ArenaMemory | None = None) -> LocalRunner:
    settings: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "cache": "var/cache",
        "max_context": 0,
        "kv_tokens": 512,
        "kv_memory": 0,
        "adapter_memory": 1 << 20,
        "max_rank": 16,
    }
    runner = build(RunnerConfig(**settings))
    if memory is not None:
        runner.memory = memory
    return runner


@pytest.fixture(scope="module")
def refs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterRef]:
    """Adapters of different sizes, in a store."""
    base = runner_of(checkpoint).info.base
    root = tmp_path_factory.mktemp("adapters")
    store, found = Store(root / "store"), {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        modules = everywhere("q_proj", "down_proj", rank=rank, layers=3)
        config = lora_config(target_modules=["q_proj", "down_proj"], r=rank)
        source = write_adapter(root / name, config, lora_tensors(modules, base, seed))
        record, _ = store.register(name, source, base)
        found[name] = AdapterRef(record.digest, str(store.path(record.digest)))
    return found


def answer(runner: LocalRunner, slot: int) -> torch.Tensor:
    return runner.forward(ForwardBatch.build([([1, 5, 9, 4], 0, [slot], ((slot, 1.0),))])).clone()


def test_adapters_that_were_moved_give_the_same_answers(
    checkpoint: Path, refs: dict[str, AdapterRef]
) -> None:
    plain = runner_of(checkpoint)
    read: dict[str, ReadAdapter] = {name: plain.read_adapter(ref) for name, ref in refs.items()}
    right = {}
    for slot, name in enumerate(RANKS):
        plain.publish_adapter(slot, read[name], [])
        right[name] = answer(plain, slot)
    sizes = [-(-read[name].nbytes // GRANULE) * GRANULE for name in ("large", "other", "last")]
    memory = ArenaMemory(sum(sizes))
    runner = runner_of(checkpoint, memory)
    ours = {name: runner.read_adapter(ref) for name, ref in refs.items()}
    for slot, name in enumerate(("small", "large", "other")):
        assert runner.prepare_adapter(ours[name])
        runner.publish_adapter(slot, ours[name], [])
    runner.remove_adapter(0)
    runner.publish_adapter(3, ours["last"], [])
    assert memory.arena.moves > 0
    for slot, name in ((1, "large"), (2, "other"), (3, "last")):
        assert torch.equal(answer(runner, slot), right[name])
    runner.remove_adapter(1)
    runner.publish_adapter(0, ours["small"], [])
    for slot, name in ((0, "small"), (2, "other"), (3, "last")):
        assert torch.equal(answer(runner, slot), right[name])
    for slot in (0, 2, 3):
        runner.remove_adapter(slot)
    assert memory.arena.used == 0


def test_merges_are_computed_aside_and_handed_over(
    checkpoint: Path, refs: dict[str, AdapterRef]
) -> None:
    memory = ArenaMemory(1 << 20)
    runner = runner_of(checkpoint, memory)
    read = runner.read_adapter(refs["small"])
    runner.publish_adapter(0, read, [])
    merged = runner.merge_adapter(read)
    runner.publish_merge(0, merged)
    assert memory.handed_over == [merged]
    assert memory.aside_now == 0


def test_virtual_tokens_follow_their_adapter(checkpoint: Path) -> None:
    decoder = runner_of(checkpoint).decoder
    config = decoder.weights.config
    random = torch.Generator().manual_seed(3)
    embeddings = torch.randn(5, config.hidden_size, generator=random)
    packed = pack(AdapterDelta({}, VirtualTokens(embeddings=embeddings)), torch.float32)
    decoder.table.publish(0, packed)
    ids = list(range(config.vocab_size, config.vocab_size + 5))
    batch = ForwardBatch.build([(ids, 0, [0], ((0, 1.0),))])
    before = decoder.forward(batch)
    moved = replace(packed, data=packed.data.clone())
    decoder.table.move(0, moved)
    packed.data.fill_(0xFF)
    assert torch.equal(decoder.forward(batch), before)
