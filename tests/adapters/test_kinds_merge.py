"""Merging on demand equals PEFT's merged model, and leaves no trace once it is undone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial

import pytest
import torch
from adapters.peft_files import TIED
from adapters.peft_kinds import BASE, Gallery, names_on, one_thread
from adapters.serving import serve
from loraplex_adapters.format.kinds.folded import FOLDED
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.adapters.merge import is_mergeable
from loraplex_model.base.config import MODEL
from loraplex_model.base.weights import BaseWeights
from loraplex_model.decoder.native import NativeDecoder

CYCLES = 1000
UNMERGED = "POLY"
"""PEFT has no merge for it, although with a task its change is one of the weights."""


def peft_merges_exactly(delta: AdapterDelta, weights: BaseWeights) -> bool:
    """Whether PEFT's merge is exact, which it is not for tied weights and for new biases."""
    config = weights.config
    unbiased = {"o_proj", "gate_proj", "up_proj", "down_proj"}
    if not config.qkv_bias:
        unbiased |= {"q_proj", "k_proj", "v_proj"}
    if config.o_bias:
        unbiased.discard("o_proj")
    new_bias = any(
        name in unbiased and change.bias is not None for (_, name), change in delta.sites.items()
    )
    outside = {(MODEL, "embed_tokens"), (MODEL, "lm_head")} & delta.sites.keys()
    return not new_bias and not (config.tie_embeddings and outside)


@pytest.mark.parametrize("variant", [TIED, "qwen3"])
def test_merged_rows_equal_pefts_merged_model(gallery: Gallery, variant: str) -> None:
    """If PEFT cannot merge, its unmerged model is compared."""
    native = serve(gallery, partial(NativeDecoder, threads=1), variant)
    kinds = set()
    for name in names_on(variant):
        spec, delta = gallery.load(variant, name)
        if not is_mergeable(delta):
            continue
        exact = spec.peft_type != UNMERGED and peft_merges_exactly(delta, native.decoder.weights)
        expected = gallery.merged(variant, name) if exact else gallery.expected(variant, name)
        beside = native.run(name)[name]
        slot = native.slots[name]
        merged = native.decoder.merge(native.adapters[name], torch.float32)
        native.decoder.table.publish_merge(slot, merged)
        found = native.run(name)[name]
        native.decoder.table.remove_merge(slot)
        assert not torch.equal(found, beside), f"{name} was not merged"
        difference = (found - expected).abs() - 1e-5 * expected.abs()
        assert difference.max() <= 3e-5, name
        if exact:
            kinds.add(spec.peft_type)
    folded = {kind.peft_type for kind in FOLDED} - {UNMERGED}
    assert kinds == {"LORA", "ADALORA", "IA3"} | (folded if variant == TIED else set())


def packed_digest(weights: BaseWeights) -> str:
    """SHA-256 over every NF4 code and every block maximum of the base."""
    digest = hashlib.sha256()
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            for tensor in (matrix.packed, matrix.absmax, *matrix.absmax_scales):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(repr(matrix.absmax_offsets).encode())
    return digest.hexdigest()


def test_a_thousand_merges_leave_every_packed_byte_and_every_answer(gallery: Gallery) -> None:
    """Adapters that change many matrices are merged in turn; all rows are compared."""
    native = serve(gallery, partial(NativeDecoder, threads=1), "llama")
    names = ["rslora", "dora", "ia3", "patterns"]
    watched = [*names, "prefix", "lora", BASE]
    before = native.run(*watched)
    packed, kept = packed_digest(native.decoder.weights), digest_of(native.decoder._kept)
    for cycle in range(CYCLES):
        name = names[cycle % len(names)]
        with one_thread():
            merged = native.decoder.merge(native.adapters[name], torch.float32)
        native.decoder.table.publish_merge(native.slots[name], merged)
        if cycle % 100 < len(names):
            assert not torch.equal(native.run(name)[name], before[name])
        native.decoder.table.remove_merge(native.slots[name])
    assert packed_digest(native.decoder.weights) == packed
    assert digest_of(native.decoder._kept) == kept
    for name, found in native.run(*watched).items():
        assert torch.equal(found, before[name]), name


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the bytes of the kernels' own copies."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
