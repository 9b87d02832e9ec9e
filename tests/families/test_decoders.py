"""Every variant gives transformers' logits on the same NF4 weights, float32, within 1e-4.

Bits of a row depend neither on its neighbours nor on its chunks, whatever the family computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import variants
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from loraplex_model.ops import build
from model.changes import KINDS
from model.mixes import MIXES, distance, ids_of, solo, together, with_adapters
from model.passes import BLOCK_SIZE, NUM_BLOCKS, Driver, Sequence, token_ids

pytestmark = pytest.mark.slow

LONG, SHORT = 40, 20
"""Lengths of two sequences, on both sides of `short_positions` and longer than any window."""

EXPERTS = ("mixtral", "qwen3-moe")
"""Variants with a router, which may choose another expert after the smallest change."""

DECODERS: dict[str, Any] = {
    "reference": partial(ReferenceDecoder, keep_dense=True),
    "native": partial(NativeDecoder, threads=1),
}
EACH = pytest.mark.parametrize("variant", variants.VARIANTS)


@dataclass(frozen=True, slots=True)
class Known:
    """A variant: its weights, by compute dtype, and transformers' logits of two sequences."""

    weights: dict[torch.dtype, BaseWeights]
    ids: tuple[list[int], list[int]]
    logits: tuple[torch.Tensor, torch.Tensor]

    def sequences(self) -> list[Sequence]:
        """The two sequences, with nothing computed yet."""
        config = self.weights[torch.float32].config
        limit = config.short_positions if config.long_rope else LONG
        return [Sequence(list(ids), is_long=len(ids) > limit) for ids in self.ids]

    def native(self, dtype: torch.dtype = torch.float32, slots: int = 1) -> Any:
        return DECODERS["native"](self.weights[dtype], NUM_BLOCKS, BLOCK_SIZE, slots)


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    """A variant by its name, written, converted and computed by transformers once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def find(variant: str) -> Known:
        path = str(variants.write(variant, root / variant))
        weights = {
            dtype: load_base(path, dtype, root / "cache").weights
            for dtype in (torch.float32, torch.bfloat16)
        }
        ids = token_ids(1, LONG, variants.VOCAB), token_ids(2, SHORT, variants.VOCAB)
        model = variants.rounded(variants.build(variant))
        with torch.no_grad():
            long, short = (model(torch.tensor([each])).logits[0] for each in ids)
        return Known(weights, ids, (long, short))

    return find


def check(sequences: list[Sequence], known: Known) -> None:
    for sequence, expected in zip(sequences, known.logits, strict=True):
        torch.testing.assert_close(torch.cat(sequence.logits), expected, atol=1e-4, rtol=1e-5)


@EACH
@pytest.mark.parametrize("decoder", DECODERS)
def test_prompts_in_chunks_among_decode_rows(
    variant: str, decoder: str, known: Callable[[str], Known]
) -> None:
    family = known(variant)
    driver = Driver(DECODERS[decoder](family.weights[torch.float32], NUM_BLOCKS, BLOCK_SIZE, 1))
    long, short = sequences = family.sequences()
    driver.step((short, 4), (long, 9))
    driver.step((short, 1), (long, 6))
    driver.step((long, 24), (short, 14))
    driver.step((short, 1), (long, 1))
    check(sequences, family)


@EACH
def test_token_by_token_and_preempted(variant: str, known: Callable[[str], Known]) -> None:
    family = known(variant)
    driver = Driver(family.native())
    long, short = sequences = family.sequences()
    for step in range(LONG):
        driver.step((long, 1), *[(short, 1)] * (step < SHORT))
    check(sequences, family)
    driver.preempt(long)
    driver.step((long, LONG - 1))
    driver.step((long, 1))
    check(sequences, family)


@EACH
def test_chunks_and_neighbours_change_no_bit(variant: str, known: Callable[[str], Known]) -> None:
    family = known(variant)
    decoder = family.native()
    long = family.sequences()[0]
    driver = Driver(decoder)
    driver.step((long, LONG))
    torch.testing.assert_close(long.logits[0], family.logits[0], atol=1e-4, rtol=1e-5)
    for end in range(1, LONG):
        again, other = family.sequences()
        driver = Driver(decoder, seed=end)
        driver.step((again, end), (other, SHORT - 1))
        driver.step((other, 1), (again, LONG - end))
        assert torch.equal(torch.cat(again.logits), long.logits[0]), end


def reference_and_native(family: Known, dtype: torch.dtype) -> tuple[Any, Any]:
    """Two decoders with an adapter of each kind."""
    weights = family.weights[dtype]
    reference = DECODERS["reference"](weights, NUM_BLOCKS, BLOCK_SIZE, len(KINDS))
    native = family.native(dtype, len(KINDS))
    return with_adapters(reference, dtype), with_adapters(native, dtype)


@EACH
def test_adapters_equal_the_reference(variant: str, known: Callable[[str], Known]) -> None:
    reference, native = reference_and_native(known(variant), torch.float32)
    found = together(native, ("everything", "half", "base"))
    for name, wanted in together(reference, found).items():
        assert distance(found[name], wanted) <= 2e-5, name


@pytest.mark.parametrize("variant", ["gemma3", "cohere", "stablelm", "olmo2", "mixtral"])
def test_adapters_equal_the_reference_in_bfloat16(
    variant: str, known: Callable[[str], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in each of their forms; elsewhere, families do not depend on the storage type.

    Keys and values are rounded to it, at places that differ in the last bit. Mixtures are computed
    without products of bfloat16: after their rounding, an expert that wins narrowly may lose.
    """
    if variant in EXPERTS:
        floats = (isa for isa in build.supported_isas() if isa not in ("amx", "avx512bf16"))
        monkeypatch.setenv("LORAPLEX_ISA", next(floats))
    reference, native = reference_and_native(known(variant), torch.bfloat16)
    found = together(native, ("everything", "norms"))
    for name, wanted in together(reference, found).items():
        assert distance(found[name], wanted) <= 2e-2, name


@EACH
def test_every_kind_changes_its_rows(variant: str, known: Callable[[str], Known]) -> None:
    native = with_adapters(known(variant).native(slots=len(KINDS)))
    ids = ids_of(native, 0)
    base = solo(native, (), ids)
    for name, mix in MIXES.items():
        assert not mix or distance(solo(native, mix, ids), base) > 1e-4, name


@EACH
def test_adapters_of_all_kinds_change_no_bit_of_others_and_merge(
    variant: str, known: Callable[[str], Known]
) -> None:
    native = with_adapters(known(variant).native(slots=len(KINDS)))
    before = together(native)
    for i, (name, mix) in enumerate(MIXES.items()):
        assert torch.equal(before[name], solo(native, mix, ids_of(native, i))), name
    merged = KINDS.index("everything")
    native.table.publish_merge(merged, native.merge(native.table.adapters[merged], torch.float32))
    during = together(native)
    native.table.remove_merge(merged)
    for name in MIXES:
        if name == "everything":
            assert not torch.equal(during[name], before[name])
            assert distance(during[name], before[name]) <= 2e-5
        else:
            assert torch.equal(during[name], before[name]), name


@pytest.mark.parametrize("variant", [v for v in variants.VARIANTS if v not in EXPERTS])
def test_bfloat16_storage(variant: str, known: Callable[[str], Known]) -> None:
    """The variants' weights are bfloat16 numbers, so that only keys and values are rounded.

    Each is by at most 2^-9 of itself, in every layer. Products of bfloat16 round the inputs of the
    four products of a layer as well.
    """
    family = known(variant)
    driver = Driver(family.native(torch.bfloat16))
    sequences = family.sequences()
    driver.step(*((sequence, len(sequence.ids)) for sequence in sequences))
    for sequence, expected in zip(sequences, family.logits, strict=True):
        roundings = 6 if "bfloat16 products" in driver.decoder.kernels else 2
        bound = roundings * len(driver.decoder.keys) * 2**-9
        assert 0 < distance(sequence.logits[0], expected) < bound


def test_a_long_sequence_has_other_positions(known: Callable[[str], Known]) -> None:
    """The oracle tells the two sets of frequencies apart."""
    family = known("phi4-mini")
    long, _ = family.sequences()
    taken_for_short, _ = family.sequences()
    taken_for_short.is_long = False
    driver = Driver(family.native())
    driver.step((long, LONG), (taken_for_short, LONG))
    assert (long.logits[0] - taken_for_short.logits[0]).abs().max() > 1e-2


@EACH
def test_the_oracle_tells_tokens_and_positions_apart(
    variant: str, known: Callable[[str], Known]
) -> None:
    family = known(variant)
    (long, *_), (first, second, *rest) = family.logits, family.ids[0]
    model = variants.rounded(variants.build(variant))
    with torch.no_grad():
        swapped = model(torch.tensor([[second, first, *rest]])).logits[0]
    assert (swapped[2] - long[2]).abs().max() > 1e-2
    assert all((one - other).abs().max() > 1e-2 for one, other in pairwise(long))
