"""Norms of heads, rotation and the copy to the cache in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda.nearness import near, rounded
from loraplex_model.base.config import NormSpan
from loraplex_model.decoder.cuda.kernels import heads as kernels
from loraplex_model.decoder.cuda.kernels.heads import HeadFormula
from loraplex_model.ops import rope

NAN = float("nan")
EPS = 1e-5
LLAMA = HeadFormula(EPS)
BLOCK_SIZES = {64: 32, 80: 16, 128: 48, 6: 256}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


@dataclass(frozen=True)
class Case:
    """Numbers of heads and their width, and what is done with them.

    Attributes:
        turned: numbers of a head that are rotated.
    """

    heads: int
    kv_heads: int
    width: int
    turned: int
    has_norms: bool = True
    formula: HeadFormula = LLAMA
    is_scaled: bool = False


def each(**options: object) -> HeadFormula:
    return HeadFormula(EPS, **options)  # type: ignore[arg-type]


CASES = [
    *(
        Case(*shape, shape[2], has_norms)
        for shape in [(9, 3, 64), (8, 8, 80), (16, 1, 128), (5, 5, 6)]
        for has_norms in (False, True)
    ),
    Case(9, 3, 64, 48),  # a part is rotated
    Case(5, 5, 80, 20, has_norms=False),
    Case(9, 3, 64, 0),  # nothing is
    Case(9, 3, 64, 64, formula=each(is_interleaved=True)),
    Case(4, 2, 80, 20, formula=each(is_interleaved=True, offset=1.0)),
    Case(9, 3, 64, 64, formula=each(span=NormSpan.EACH)),
    Case(4, 2, 80, 40, formula=each(span=NormSpan.EACH, is_layer=True)),
    Case(9, 3, 64, 64, formula=each(span=NormSpan.ALL)),
    Case(8, 8, 80, 20, formula=each(span=NormSpan.ALL, is_layer=True, offset=0.5)),
    Case(9, 3, 64, 64, formula=each(is_layer=True), is_scaled=True),
    Case(9, 3, 64, 64, formula=each(offset=1.0), is_scaled=True),
]


def normed(x: torch.Tensor, weight: torch.Tensor, formula: HeadFormula) -> torch.Tensor:
    """Heads [T, heads, width] in float64, normed; rounded where the kernel rounds."""
    wide = x.double()
    axes = (1, 2) if formula.span is NormSpan.ALL else (2,)
    if formula.is_layer:
        wide = wide - wide.mean(axes, keepdim=True)
    unit = wide * (wide.pow(2).mean(axes, keepdim=True) + EPS).rsqrt()
    factor = weight.double().view(-1, x.shape[2]) + formula.offset
    if not formula.is_layer and not formula.offset:
        unit = rounded(unit, x.dtype).double()
    return rounded(unit * factor, x.dtype)


@TYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_cache(case: Case, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    block_size, formula = BLOCK_SIZES[case.width], case.formula
    positions = torch.tensor([0, 1, 77, 40, 3], dtype=torch.int32)
    slots = torch.tensor([block_size * 2 + 3, 0, -1, 4 * block_size - 1, 1], dtype=torch.int32)
    cos = sin = None
    if case.turned:
        frequencies = 10000.0 ** (-torch.arange(0, case.turned, 2) / case.turned)
        tables = rope.tables(torch.arange(80), frequencies, 1.25)
        cos, sin = (table.flatten(1).contiguous() for table in tables)
    sizes = [case.heads, case.kv_heads, case.kv_heads]
    qkv = (0.5 + torch.randn(len(positions), sum(sizes) * case.width, generator=random)).to(dtype)
    shared = formula.span is NormSpan.HEAD
    norms = [
        torch.randn((1 if shared else own) * case.width, generator=random).to(dtype)
        if case.has_norms
        else None
        for own in sizes[:2]
    ]
    scales = torch.rand(80, generator=random).to(dtype).float() if case.is_scaled else None
    q = torch.full((len(positions), case.heads, case.width), NAN, dtype=dtype)
    keys = torch.full((4, case.kv_heads, block_size, case.width), NAN, dtype=dtype)
    values = torch.full_like(keys, NAN)
    kernels.rope_cache(qkv, positions, slots, cos, sin, q, keys, values, *norms, formula, scales)

    own = list(qkv.view(len(qkv), -1, case.width).split(sizes, dim=1))
    for i, weight in enumerate(norms):
        if weight is not None:
            own[i] = normed(own[i], weight, formula)
    turned = [x.double() for x in own[:2]]
    if cos is not None and sin is not None:
        at = [table[positions.long(), None].double() for table in (cos, sin)]
        turned = [rope.rotate(x, *at, interleaved=formula.is_interleaved) for x in turned]
    if scales is not None:
        turned[0] = rounded(turned[0], dtype).double() * scales[positions.long(), None, None]
    roundings = 3 if case.has_norms else 1
    near(q, turned[0], roundings)
    is_written = torch.zeros(4, block_size, dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        is_written[block, offset] = True
        near(keys[block, :, offset], turned[1][row], roundings)
        assert torch.equal(values[block, :, offset], own[2][row])
    for cache in (keys, values):
        assert torch.equal(~cache.isnan().any(-1).any(1), is_written)
        assert torch.equal(~cache.isnan().all(-1).all(1), is_written)


def test_every_configuration_has_a_name_of_its_own() -> None:
    names = [compilation.name for compilation in kernels.compilations()]
    assert len(set(names)) == len(names)
