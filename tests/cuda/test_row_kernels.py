"""Embedding, norms, rotation and SiLU in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from loraplex_model.decoder.cuda.kernels import rows
from loraplex_model.ops import rope

NAN = float("nan")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def near(found: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> None:
    """The two are apart by no more than `roundings` roundings to the compute type."""
    tolerance = roundings * (2**-8 if found.dtype == torch.bfloat16 else 4e-6)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance / 4)


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, by way of float32."""
    return exact.float().to(dtype)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@TYPES
@pytest.mark.parametrize("hidden", [64, 1030])
def test_embed(hidden: int, dtype: torch.dtype, random: torch.Generator) -> None:
    table = torch.randn(50, hidden, generator=random).to(dtype)
    # drawn tokens: 7, none since a row was not finite, and one that no table has
    last = torch.tensor([7, -1, 60], dtype=torch.int32)
    tokens = torch.tensor([0, 49, 50, 51, -1, -2, -3, -4, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = torch.full((len(tokens), hidden), NAN, dtype=dtype)
    rows.embed(tokens, table, last, out)
    wanted = torch.zeros_like(out)
    wanted[0], wanted[1], wanted[4] = table[0], table[49], table[7]
    assert torch.equal(out, wanted)


@TYPES
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("hidden", [64, 1030])
def test_norm_residual(
    hidden: int, has_delta: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    x, delta = (3 * torch.randn(5, hidden, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=random).to(dtype)
    total = rounded(x.float() + delta.float(), dtype) if has_delta else x.clone()
    normed = torch.full_like(x, NAN)
    rows.norm_residual(x, delta if has_delta else None, weight, normed, 1e-5)
    assert torch.equal(x, total)
    wide = total.double()
    unit = rounded(wide * (wide.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(), dtype)
    near(normed, weight.double() * unit.double(), roundings=2)


@TYPES
def test_rows_that_are_wanted_are_normed(dtype: torch.dtype, random: torch.Generator) -> None:
    x, delta = (torch.randn(6, 576, generator=random).to(dtype) for _ in range(2))
    weight = torch.randn(576, generator=random).to(dtype)
    every = torch.full_like(x, NAN)
    rows.norm_residual(x.clone(), delta, weight, every, 1e-5)
    kept, normed = x.clone(), torch.full((4, 576), NAN, dtype=dtype)
    wanted = torch.tensor([5, 2, 5, -1], dtype=torch.int32)
    rows.norm_residual(x, delta, weight, normed, 1e-5, wanted)
    assert torch.equal(x, kept)
    assert torch.equal(normed[:3], every[wanted[:3].long()])
    assert normed[3].isnan().all()


def split_heads(qkv: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    shaped = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    return shaped.split([heads, kv_heads, kv_heads], dim=1)


def normed_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    unit = rounded(wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt(), x.dtype)
    return rounded(weight.double() * unit.double(), x.dtype)


@TYPES
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "block_size"),
    [(9, 3, 64, 32), (8, 8, 80, 16), (16, 1, 128, 48), (5, 5, 6, 256)],
)
def test_rope_cache(
    heads: int,
    kv_heads: int,
    width: int,
    block_size: int,
    has_norms: bool,
    dtype: torch.dtype,
    random: torch.Generator,
) -> None:
    positions = torch.tensor([0, 1, 77, 40, 3], dtype=torch.int32)
    slots = torch.tensor([block_size * 2 + 3, 0, -1, 4 * block_size - 1, 1], dtype=torch.int32)
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    tables = rope.tables(torch.arange(80), frequencies, 1.25)
    cos, sin = (table.flatten(1).contiguous() for table in tables)
    shape = (len(positions), (heads + 2 * kv_heads) * width)
    qkv = torch.randn(shape, generator=random).to(dtype)
    norms = [torch.randn(width, generator=random).to(dtype) if has_norms else None for _ in "qk"]
    q = torch.full((len(positions), heads, width), NAN, dtype=dtype)
    keys = torch.full((4, kv_heads, block_size, width), NAN, dtype=dtype)
    values = torch.full_like(keys, NAN)
    rows.rope_cache(qkv, positions, slots, cos, sin, q, keys, values, *norms, 1e-5)

    own_q, own_k, own_v = split_heads(qkv, heads, kv_heads)
    if norms[0] is not None and norms[1] is not None:
        own_q, own_k = normed_heads(own_q, norms[0], 1e-5), normed_heads(own_k, norms[1], 1e-5)
    at = [table[positions.long()].double() for table in tables]
    roundings = 3 if has_norms else 1
    near(q, rope.rotate(own_q.double(), *at), roundings)
    turned = rope.rotate(own_k.double(), *at)
    is_written = torch.zeros(4, block_size, dtype=torch.bool)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        is_written[block, offset] = True
        near(keys[block, :, offset], turned[row], roundings)
        assert torch.equal(values[block, :, offset], own_v[row])
    for cache in (keys, values):
        assert torch.equal(~cache.isnan().any(-1).any(1), is_written)
        assert torch.equal(~cache.isnan().all(-1).all(1), is_written)


@TYPES
@pytest.mark.parametrize("width", [64, 1030])
def test_silu_mul(width: int, dtype: torch.dtype, random: torch.Generator) -> None:
    gate_up = 20 * torch.randn(4, 2 * width, generator=random).to(dtype)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    out = torch.full((4, width), NAN, dtype=dtype)
    rows.silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=1)
    near(out, torch.nn.functional.silu(gate) * up, roundings=2)


def test_every_configuration_has_a_name_of_its_own() -> None:
    names = [compilation.name for compilation in rows.compilations()]
    assert len(set(names)) == len(names)
