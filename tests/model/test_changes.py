"""Whatever an adapter changes, in one batch with all others: right, and nobody else's affair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loraplex_model.adapters.delta import AdapterDelta, RowsDelta
from loraplex_model.adapters.pack import pack
from loraplex_model.base.config import MODEL
from loraplex_model.decoder import forward
from loraplex_model.decoder.reference import ReferenceDecoder
from model.changes import KINDS, random_prompt
from model.conftest import Load
from model.mixes import MIXES, distance, ids_of, solo, together, with_adapters
from model.passes import BLOCK_SIZE, NUM_BLOCKS, token_ids

from model import tiny

VARIANTS = ["llama", "llama-tied-bias", "llama-odd-sizes", "qwen3-window-bias"]


@pytest.fixture
def decoder(variant: str, decoder_class: Any, load_tiny: Load) -> Any:
    weights = load_tiny(variant).weights
    return with_adapters(decoder_class(weights, NUM_BLOCKS, BLOCK_SIZE, len(KINDS)))


def is_for_cuda(decoder: Any) -> bool:
    return str(decoder.kernels).startswith("Triton")


@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_of_every_kind_change_no_bit(decoder: Any) -> None:
    for index, (name, got) in enumerate(together(decoder).items()):
        assert torch.equal(got, solo(decoder, MIXES[name], ids_of(decoder, index))), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_changes_its_rows(decoder: Any) -> None:
    ids = ids_of(decoder, 0)
    base = solo(decoder, (), ids)
    for name, mix in MIXES.items():
        if mix:
            assert (solo(decoder, mix, ids) - base).abs().max() > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_equals_the_reference(
    variant: str,
    dtype: torch.dtype,
    decoder_class: Any,
    load_tiny: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = load_tiny(variant, dtype).weights
    reference, other = (
        with_adapters(kind(weights, NUM_BLOCKS, BLOCK_SIZE, len(KINDS)), dtype)
        for kind in (ReferenceDecoder, decoder_class)
    )
    wanted = together(reference)
    # Keys and values are rounded to the storage type, at places that differ in the last bit.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    if dtype == torch.bfloat16 and is_for_cuda(other):
        # Its activations have the compute type, so they are rounded too. How much that matters, the
        # reference says itself when it rounds its activations; the places are not quite the same.
        monkeypatch.setattr(forward, "activation_dtype", lambda stored: stored.dtype)
        rounded = together(
            with_adapters(ReferenceDecoder(weights, NUM_BLOCKS, BLOCK_SIZE, len(KINDS)), dtype)
        )
        tolerance = 2 * max(distance(rounded[name], wanted[name]) for name in MIXES)
        assert tolerance < 0.5
    for name, got in together(other).items():
        assert distance(got, wanted[name]) <= tolerance, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_rows_agree_and_others_keep_their_bits(decoder: Any) -> None:
    """Merged in float32: equal but for the order of summation. After unmerging: equal bits."""
    before = together(decoder)
    merged = [slot for slot, kind in enumerate(KINDS) if kind in ("lora", "gains", "everything")]
    names = {KINDS[slot] for slot in merged}
    for slot in merged:
        adapter = decoder.table.adapters[slot]
        decoder.table.publish_merge(slot, decoder.merge(adapter, torch.float32))
    during = together(decoder)
    for slot in merged:
        decoder.table.remove_merge(slot)
    after = together(decoder)

    for name in MIXES:
        assert torch.equal(after[name], before[name]), name
        if name in names:
            assert not torch.equal(during[name], before[name]), f"{name} was not merged"
            scale = before[name].abs().max()
            assert (during[name] - before[name]).abs().max() <= 2e-5 * scale, name
        else:
            assert torch.equal(during[name], before[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_virtual_tokens_stand_before_a_prompt(decoder_class: Any, variant: str, load_tiny: Load):
    """Their ids follow the vocabulary's; computing them once and copying blocks gives the same."""
    weights = load_tiny(variant).weights
    vocab, count = weights.config.vocab_size, 6
    embeddings = random_prompt(weights.config, count, seed=3)
    decoder = decoder_class(weights, NUM_BLOCKS, BLOCK_SIZE, 2)
    decoder.table.publish(0, pack(embeddings, torch.float32))
    ids = [*range(vocab, vocab + count), *token_ids(1, 7, tiny.VOCAB)]
    with_prompt = solo(decoder, ((0, 1.0),), ids)

    # The same embeddings as rows of tokens that are in the vocabulary.
    taken = sorted(set(range(40, 60)) - set(ids))[:count]
    at = torch.tensor(taken)
    rows = embeddings.virtual.embeddings - weights.embed[at]

    change = RowsDelta(token_ids=at.int(), rows=rows)
    decoder.table.publish(1, pack(AdapterDelta({(MODEL, "embed_tokens"): change}), torch.float32))
    as_rows = solo(decoder, ((1, 1.0),), [*taken, *ids[count:]])
    assert (with_prompt - as_rows).abs().max() <= 1e-5 * as_rows.abs().max()
