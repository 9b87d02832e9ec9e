"""Every kind of adapter yields PEFT's logits on the same NF4 base, alone and in mixed batches."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from adapters.peft_files import TIED
from adapters.peft_kinds import BASE, BLENDS, SERVED, VARIANTS, Gallery, names_on
from adapters.serving import Served, serve
from loraplex_adapters.format.kinds import KINDS
from loraplex_model.adapters.pack import pack
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder

DECODERS: dict[str, Any] = {
    "reference": partial(ReferenceDecoder, keep_dense=True),
    "native": partial(NativeDecoder, threads=1),
}


def assert_equals_peft(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def served(gallery: Gallery) -> Any:
    """`(decoder's name, variant) -> Served`, each made once."""
    return cache(lambda name, variant: serve(gallery, DECODERS[name], variant))


def everything(variant: str) -> list[str]:
    """All adapters of a base, a row without an adapter, and blends."""
    names = names_on(variant)
    return [*names[::2], BASE, *(BLENDS if variant == TIED else ()), *names[1::2]]


def test_every_kind_is_among_them(gallery: Gallery) -> None:
    found = {gallery.load(variant, name)[0].peft_type for variant, name in SERVED}
    assert found == KINDS.keys()
    assert {gallery.load(TIED, name)[0].peft_type for name in names_on(TIED)} == found


@pytest.mark.parametrize(("variant", "name"), SERVED)
def test_an_adapter_changes_what_it_answers(gallery: Gallery, variant: str, name: str) -> None:
    """Otherwise parity would prove nothing."""
    changed = gallery.expected(variant, name) - gallery.bare(variant, name)
    assert changed.abs().max() > 3e-2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("variant", "name"), SERVED)
def test_alone_it_equals_peft(
    gallery: Gallery, served: Any, variant: str, name: str, decoder: str
) -> None:
    found = served(decoder, variant).run(name)[name]
    assert_equals_peft(found, gallery.expected(variant, name))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", BLENDS)
def test_a_blend_adds_up_the_changes_of_pefts_modules(
    gallery: Gallery, served: Any, name: str, decoder: str
) -> None:
    changed = gallery.expected(TIED, name) - gallery.bare(TIED, name)
    assert changed.abs().max() > 3e-2
    assert_equals_peft(served(decoder, TIED).run(name)[name], gallery.expected(TIED, name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_among_all_others_it_equals_peft_and_itself_alone_bit_for_bit(
    gallery: Gallery, served: Any, variant: str
) -> None:
    native: Served = served("native", variant)
    names = everything(variant)
    for name, found in native.run(*names, seed=3).items():
        assert torch.equal(found, native.run(name)[name]), name
        assert_equals_peft(found, gallery.expected(variant, name))


@pytest.mark.parametrize("variant", [TIED, "qwen3"])
def test_neighbours_change_no_bit_in_bfloat16(gallery: Gallery, variant: str) -> None:
    native = serve(gallery, NativeDecoder, variant, torch.bfloat16)
    for name, found in native.run(*everything(variant), seed=4).items():
        assert torch.equal(found, native.run(name)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_their_sizes_are_known_before_they_are_packed(
    gallery: Gallery, variant: str, dtype: torch.dtype
) -> None:
    for name in names_on(variant):
        spec, delta = gallery.load(variant, name, dtype)
        packed = pack(delta, dtype)
        assert packed.nbytes == spec.packed_bytes, name
        assert packed.virtual_tokens == spec.virtual_tokens, name
