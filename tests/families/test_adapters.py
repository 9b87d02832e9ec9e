"""Adapters of every kind on the families: PEFT's logits on the same NF4 base."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import adapter_kinds, variants
from loraplex_adapters.convert.export.base import open_base
from loraplex_adapters.convert.export.merged import write_dense
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.adapters.merge import is_mergeable
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = token_ids(3, 19, variants.VOCAB)


class Bases:
    """Every variant as we serve it, and as transformers computes it on the same NF4 weights."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.ours = cache(self._ours)
        self.theirs = cache(self._theirs)

    def _ours(self, variant: str) -> LoadedBase:
        variants.write(variant, self._root / variant)
        return open_base(str(self._root / variant), self._root / "cache")

    def _theirs(self, variant: str) -> PreTrainedModel:
        return variants.rounded(variants.build(variant))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def theirs(model: Any) -> torch.Tensor:
    """Logits [T, vocab] of `IDS`, without those of virtual tokens before them."""
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0, -len(IDS) :]


DECODERS: dict[str, Any] = {
    "reference": partial(ReferenceDecoder, keep_dense=True),
    "native": partial(NativeDecoder, threads=1),
}


def ours(name: str, base: LoadedBase, delta: AdapterDelta, *, merged: bool = False) -> torch.Tensor:
    """Logits [T, vocab] of `IDS` with the adapter, in two chunks."""
    decoder = DECODERS[name](base.weights, NUM_BLOCKS, BLOCK_SIZE, 1)
    packed = pack(delta, torch.float32)
    decoder.table.publish(0, packed)
    if merged:
        decoder.table.publish_merge(0, decoder.merge(packed, torch.float32))
    driver = Driver(decoder)
    sequence = _begin(driver, packed)
    driver.step((sequence, 11))
    driver.step((sequence, len(sequence.ids) - sequence.done))
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "kind"), adapter_kinds.pairs())
def test_an_adapter_equals_peft(bases: Bases, variant: str, kind: str, tmp_path: Path) -> None:
    base, model = bases.ours(variant), bases.theirs(variant)
    peft_model = adapter_kinds.adapted(kind, base.weights.info, model, tmp_path / "adapter")
    spec = inspect(tmp_path / "adapter", base.weights.info)
    spec, delta = load(tmp_path / "adapter", spec.digest, base.weights)
    expected = theirs(peft_model)
    assert (expected - theirs(model)).abs().max() > 3e-2, "parity would prove nothing"
    for decoder in DECODERS:
        assert_equals(ours(decoder, base, delta), expected)
        if is_mergeable(delta):
            assert_equals(ours(decoder, base, delta, merged=True), expected)
    assert pack(delta, torch.float32).nbytes == spec.packed_bytes
    if kind in adapter_kinds.EXPORTED:
        write_dense(tmp_path / "merged", base, delta, torch.float32, stamps={})
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert_equals(theirs(merged.eval()), expected)
