"""The variants as bases of adapters: as we serve them, and as transformers computes them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import adapter_kinds, variants
from loraplex_adapters.convert.export.base import open_base
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids
from transformers import PreTrainedModel

IDS = token_ids(3, 19, variants.VOCAB)


class Bases:
    """Every variant as we serve it, and as transformers computes it on the same NF4 weights."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.ours = cache(self._ours)
        self.theirs = cache(self._theirs)

    def _ours(self, variant: str) -> LoadedBase:
        adapter_kinds.built(variant).save_pretrained(self._root / variant)
        return open_base(str(self._root / variant), self._root / "cache")

    def _theirs(self, variant: str) -> PreTrainedModel:
        return variants.rounded(copy.deepcopy(adapter_kinds.built(variant)))


def theirs(model: Any) -> torch.Tensor:
    """Logits [T, vocab] of `IDS`, without those of virtual tokens before them."""
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -len(IDS) :]


def ours(base: LoadedBase, delta: AdapterDelta) -> torch.Tensor:
    """Logits [T, vocab] of `IDS` with the adapter, by the reference in one pass."""
    return _logits(ReferenceDecoder(base.weights, NUM_BLOCKS, BLOCK_SIZE, 1), delta, 64)


def native(base: LoadedBase, delta: AdapterDelta, *, merged: bool = False) -> torch.Tensor:
    """The same by the native decoder, in chunks of 7 tokens."""
    decoder = NativeDecoder(base.weights, NUM_BLOCKS, BLOCK_SIZE, 1, threads=1)
    return _logits(decoder, delta, 7, merged=merged)


def _logits(decoder: Any, delta: AdapterDelta, chunk: int, *, merged: bool = False) -> torch.Tensor:
    packed = pack(delta, torch.float32)
    decoder.table.publish(0, packed)
    if merged:
        decoder.table.publish_merge(0, decoder.merge(packed, torch.float32))
    driver = Driver(decoder)
    sequence = _begin(driver, packed)
    while left := len(sequence.ids) - sequence.done:
        driver.step((sequence, min(left, chunk)))
    return torch.cat(sequence.logits)[-len(IDS) :]


def _begin(driver: Driver, packed: PackedAdapter) -> Sequence:
    virtual, mix = packed.virtual, ((0, 1.0),)
    if virtual is None:
        return Sequence(IDS, mix)
    if virtual.keys is None or virtual.values is None:
        return Sequence([variants.VOCAB + j for j in range(virtual.count)] + IDS, mix)
    shared = [driver.free.pop() for _ in range(-(-virtual.count // BLOCK_SIZE))]
    driver.decoder.write_prefix(shared, virtual.keys, virtual.values)
    return driver.begin_after(shared, virtual.count, IDS, mix)


def assert_equals(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)
