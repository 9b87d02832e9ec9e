"""Tiny base models for exports, and the logits that a server would compute on them."""

from __future__ import annotations

from pathlib import Path

import torch
from loraplex_adapters.convert.export.base import open_base
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.decoder.reference import ReferenceDecoder
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids

from model import tiny


class Bases:
    """Tiny base models by variant, each written and converted once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, LoadedBase] = {}

    def directory(self, variant: str) -> Path:
        path = self._root / variant
        if not path.exists():
            tiny.write(variant, path)
        return path

    def __call__(self, variant: str) -> LoadedBase:
        if variant not in self._open:
            self._open[variant] = open_base(str(self.directory(variant)), self.cache)
        return self._open[variant]

    @property
    def cache(self) -> Path:
        return self._root / "cache"


PROMPT = token_ids(3, 19, tiny.VOCAB)


def rows(
    base: LoadedBase, *adapters: tuple[AdapterDelta, float], merged: bool = False
) -> torch.Tensor:
    """Logits [T, vocab] of `PROMPT` under a mix, unmerged or with dense copies."""
    decoder = ReferenceDecoder(base.weights, NUM_BLOCKS, BLOCK_SIZE, 4, keep_dense=True)
    for slot, (delta, _) in enumerate(adapters):
        packed = pack(delta, torch.float32)
        decoder.table.publish(slot, packed)
        if merged:
            decoder.table.publish_merge(slot, decoder.merge(packed, torch.float32))
    mix = tuple((slot, weight) for slot, (_, weight) in enumerate(adapters))
    sequence = Sequence(PROMPT, mix)
    Driver(decoder).step((sequence, len(PROMPT)))
    return torch.cat(sequence.logits)


def agree(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Asserts that logits are equal relative to the largest of them."""
    scale = wanted.abs().max().clamp(min=1)
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)
