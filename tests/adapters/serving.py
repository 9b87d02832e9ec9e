"""Runs adapters of every kind through a decoder's paged cache, as the engine's runner does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from adapters.peft_kinds import BASE, BLENDS, Gallery, ids_of, names_on, one_thread
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.base.batch import ForwardBatch, Mix
from model.passes import BLOCK_SIZE, Driver, Sequence

NUM_BLOCKS = 512


@dataclass(frozen=True)
class Served:
    """A decoder with all adapters of its base published, each by its name."""

    decoder: Any
    adapters: Mapping[str, PackedAdapter]
    slots: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", {name: i for i, name in enumerate(self.adapters)})
        for name, adapter in self.adapters.items():
            self.decoder.table.publish(self.slots[name], adapter)

    def run(self, *names: str, seed: int = 0) -> dict[str, torch.Tensor]:
        """Logits [tokens, vocab] of every name for its own prompt, computed in the same passes.

        Prompts are split into two chunks and two single tokens, and begin at different passes, so
        that most passes have both prefill and decode rows.
        """
        driver = Driver(self.decoder, seed)
        rows = [self._begin(driver, name) for name in names]
        for tick in count():
            running = [row for i, row in enumerate(rows) if i % 3 <= tick]
            parts = [(row, _next(row)) for row in running if row.done < len(row.ids)]
            if not parts:
                break
            with one_thread():
                driver.step(*parts)
        return {name: torch.cat(row.logits) for name, row in zip(names, rows, strict=True)}

    def _begin(self, driver: Driver, name: str) -> Sequence:
        if name == BASE:
            return Sequence(ids_of(name))
        if name in BLENDS:
            return Sequence(ids_of(name), tuple((self.slots[n], w) for n, w in BLENDS[name]))
        mix: Mix = ((self.slots[name], 1.0),)
        virtual = self.adapters[name].virtual
        if virtual is None:
            return Sequence(ids_of(name), mix)
        shared = [driver.free.pop() for _ in range(-(-virtual.count // BLOCK_SIZE))]
        if virtual.keys is not None and virtual.values is not None:
            self.decoder.write_prefix(shared, virtual.keys, virtual.values)
        else:
            first = self.decoder.weights.config.vocab_size
            tokens = list(range(first, first + virtual.count))
            self.decoder.forward(ForwardBatch.build([(tokens, 0, shared, mix)]))
        return driver.begin_after(shared, virtual.count, ids_of(name), mix)


def serve(gallery: Gallery, kind: Any, variant: str, dtype: torch.dtype = torch.float32) -> Served:
    """Publishes all adapters that fit a base, on a decoder `kind(weights, blocks, size, slots)`."""
    adapters = {
        name: pack(gallery.load(variant, name, dtype)[1], dtype) for name in names_on(variant)
    }
    weights = gallery.weights(variant, dtype)
    return Served(kind(weights, NUM_BLOCKS, BLOCK_SIZE, len(adapters)), adapters)


def _next(row: Sequence) -> int:
    left = len(row.ids) - row.done
    return 4 if not row.logits else max(left - 2, 1)
