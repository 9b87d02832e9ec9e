"""Queries, keys and values before attention: norms of heads, rotation, and the copy to the cache.

Sums are float32, and results are rounded to the compute type where Hugging Face rounds them, except
that a rotation is rounded once instead of after each product. What a family does otherwise than
Llama is a constant, so Llama's kernel holds no code for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from loraplex_model.base.config import DecoderConfig, Norm, NormSpan
from loraplex_model.decoder.cuda.kernels.common import INTERPRETED, TYPES, Compilation, rounded

_ROWS = 16 if INTERPRETED else 1
"""Rows of a program. The interpreter's time goes by the number of programs, a device's does not."""
_HEADS = 8  # heads of a program, unless the heads of a row are normed together


@dataclass(frozen=True, slots=True)
class HeadFormula:
    """How a family norms and rotates the heads of queries and keys; the defaults are Llama's.

    Attributes:
        eps: added to the mean square (or the variance) in the norms.
        span: what the norms run over.
        is_layer: whether the mean is subtracted before, as LayerNorm does.
        offset: added to the weights of the norms.
        is_interleaved: whether the rotated pairs are (2 i, 2 i + 1).
    """

    eps: float
    span: NormSpan = NormSpan.HEAD
    is_layer: bool = False
    offset: float = 0.0
    is_interleaved: bool = False

    @staticmethod
    def of(config: DecoderConfig) -> HeadFormula:
        """The formula of a base model."""
        return HeadFormula(
            config.rms_norm_eps,
            config.qk_norm_span,
            config.norm is Norm.LAYER,
            config.norm_offset,
            config.rope_interleaved,
        )


def rope_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    formula: HeadFormula,
    query_scales: torch.Tensor | None = None,
) -> None:
    """Norms the heads if the model does, rotates queries and keys, and fills the cache.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim]: queries, keys and values of each row.
        positions: int32 [T], a row of the tables for each row.
        kv_slots: int32 [T], `block * block_size + offset` of each row in the cache; a row with a
            negative slot is not written to the cache.
        cos, sin: float32 [positions, width / 2], with the model's scale; see `ops.rope`. The first
            `width` numbers of a head are rotated. None rotates nothing.
        q: [T, heads, head_dim], the rotated queries.
        keys, values: [blocks, kv_heads, block_size, head_dim].
        q_norm, k_norm: weights of the norms, of a size that the span says; None without them.
        query_scales: float32 [positions], factors on the rotated queries, numbers of the type of q;
            None for 1.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    for tensor in (qkv, q, keys, values, cos, sin, q_norm, k_norm, query_scales):
        assert tensor is None or tensor.is_contiguous()
    assert qkv.shape[1] == (heads + 2 * kv_heads) * head_dim
    _check_norms(q_norm, k_norm, heads, kv_heads, head_dim, formula)
    assert cos is None or sin is None or cos.shape == sin.shape
    constants, options = _rope_configuration(
        *(heads, kv_heads, head_dim, block_size, q_norm is not None),
        turned=0 if cos is None else cos.shape[1],
        formula=formula,
        is_scaled=query_scales is not None,
    )
    grid = (triton.cdiv(len(q), _ROWS), triton.cdiv(heads + 2 * kv_heads, constants["HEADS"]))
    _rope_cache[grid](
        qkv,
        positions,
        kv_slots,
        kv_slots if cos is None else cos,
        kv_slots if sin is None else sin,
        kv_slots if query_scales is None else query_scales,
        q,
        keys,
        values,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        len(q),
        formula.eps,
        **constants,
        **options,
    )


def _check_norms(
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    formula: HeadFormula,
) -> None:
    assert (q_norm is None) == (k_norm is None)
    shared = formula.span is NormSpan.HEAD
    for weight, count in ((q_norm, heads), (k_norm, kv_heads)):
        assert weight is None or weight.numel() == (1 if shared else count) * head_dim


def _rope_configuration(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    has_norms: bool,
    *,
    turned: int,
    formula: HeadFormula,
    is_scaled: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `_rope_cache` and the options of its launch.

    Where the heads of a row are normed together, one program has all of them.
    """
    assert 2 * turned <= head_dim
    has_all = has_norms and formula.span is NormSpan.ALL
    most, half = _HEADS, triton.next_power_of_2(head_dim // 2)
    if has_all:
        most = triton.next_power_of_2(heads + 2 * kv_heads)
    constants = {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "HEADS": most,
        "ROWS": _ROWS,
        "NORMS": formula.span.value if has_norms else "",
        "IS_LAYER": has_norms and formula.is_layer,
        "OFFSET": float(formula.offset) if has_norms else 0.0,
        "TURNED": turned,
        "IS_INTERLEAVED": formula.is_interleaved,
        "IS_SCALED": is_scaled,
    }
    return constants, {"num_warps": min(max(most * half // 512, 4), 16) if has_all else 4}


@triton.jit
def _weighted(
    unit, q_weight, k_weight, q_cell, k_cell, TYPE: tl.constexpr, IS_LAYER: tl.constexpr,
    OFFSET: tl.constexpr
):  # fmt: skip
    """Normed halves of heads times their weights; those of values are not defined."""
    # for every cell at most one of the two loads is not masked
    weight = tl.load(q_weight, mask=q_cell, other=0.0).to(tl.float32)
    weight += tl.load(k_weight, mask=k_cell, other=0.0).to(tl.float32)
    if IS_LAYER or OFFSET != 0.0:  # rounded once
        return rounded(unit * (weight + OFFSET), TYPE).to(tl.float32)
    else:
        return rounded(rounded(unit, TYPE).to(tl.float32) * weight, TYPE).to(tl.float32)


@triton.jit
def _mean(
    sums, is_q, is_k, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, NORMS: tl.constexpr
):  # fmt: skip
    """Means of sums over heads [ROWS * HEADS]: of each head, or of all queries and all keys."""
    if NORMS == "all":
        q_sum = tl.sum(tl.reshape(tl.where(is_q, sums, 0.0), [ROWS, HEADS]), 1)
        k_sum = tl.sum(tl.reshape(tl.where(is_k, sums, 0.0), [ROWS, HEADS]), 1)
        q_mean = tl.broadcast_to((q_sum / (Q_HEADS * HEAD_DIM))[:, None], [ROWS, HEADS])
        k_mean = tl.broadcast_to((k_sum / (KV_HEADS * HEAD_DIM))[:, None], [ROWS, HEADS])
        q_mean, k_mean = tl.reshape(q_mean, [ROWS * HEADS]), tl.reshape(k_mean, [ROWS * HEADS])
        return tl.where(is_q, q_mean, k_mean)
    else:
        return sums / HEAD_DIM


@triton.jit
def _normed(
    a, b, q_norm, k_norm, place, apart, head, is_q, is_k, is_half, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, NORMS: tl.constexpr, IS_LAYER: tl.constexpr, OFFSET: tl.constexpr,
    TYPE: tl.constexpr
):  # fmt: skip
    """Both halves of heads, normed; those of values are not defined."""
    if IS_LAYER:
        mean = _mean(
            tl.sum(a, 1) + tl.sum(b, 1), is_q, is_k, Q_HEADS, KV_HEADS, HEAD_DIM, HEADS, ROWS, NORMS
        )[:, None]  # fmt: skip
        a, b = tl.where(is_half, a - mean, 0.0), tl.where(is_half, b - mean, 0.0)
    squares = _mean(
        tl.sum(a * a, 1) + tl.sum(b * b, 1), is_q, is_k, Q_HEADS, KV_HEADS, HEAD_DIM, HEADS, ROWS,
        NORMS
    )  # fmt: skip
    scale = tl.rsqrt(squares + eps)[:, None]
    q_cell, k_cell = is_q[:, None] & is_half, is_k[:, None] & is_half
    if NORMS == "head":
        q_at = place[None, :] + (head * 0)[:, None]
        k_at = q_at
    else:
        q_at = place[None, :] + (head * HEAD_DIM)[:, None]
        k_at = q_at - Q_HEADS * HEAD_DIM
    a = _weighted(a * scale, q_norm + q_at, k_norm + k_at, q_cell, k_cell, TYPE, IS_LAYER, OFFSET)
    b = _weighted(
        b * scale, q_norm + q_at + apart, k_norm + k_at + apart, q_cell, k_cell, TYPE, IS_LAYER,
        OFFSET
    )  # fmt: skip
    return a, b


@triton.jit
def _rotated(
    a, b, cos, sin, position, d, is_half, WIDTH: tl.constexpr, TURNED: tl.constexpr,
    TYPE: tl.constexpr
):  # fmt: skip
    """Both halves of heads, rotated and rounded."""
    if TURNED == 0:
        return rounded(a, TYPE), rounded(b, TYPE)
    else:
        angle = position[:, None] * TURNED + d[None, :]
        if TURNED == WIDTH:
            c = tl.load(cos + angle, mask=is_half, other=0.0)
            s = tl.load(sin + angle, mask=is_half, other=0.0)
        else:  # numbers that are not rotated have an angle of zero
            c = tl.load(cos + angle, mask=(d < TURNED)[None, :], other=1.0)
            s = tl.load(sin + angle, mask=(d < TURNED)[None, :], other=0.0)
        return rounded(a * c - b * s, TYPE), rounded(b * c + a * s, TYPE)


@triton.jit
def _pairs(d, WIDTH: tl.constexpr, TURNED: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """Where in a head the first number of each pair is, and how far the second is from it.

    Of a head of which `2 * TURNED` numbers are rotated the other numbers form pairs too.
    """
    if IS_INTERLEAVED:
        return 2 * d, 1
    elif TURNED == 0 or TURNED == WIDTH:
        return d, WIDTH
    else:
        apart = tl.where(d < TURNED, TURNED, WIDTH - TURNED)[None, :]
        return tl.where(d < TURNED, d, d + TURNED), apart


@triton.jit(do_not_specialize=["count"])
def _rope_cache(
    qkv, positions, kv_slots, cos, sin, query_scales, q, keys, values, q_norm, k_norm, count, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, NORMS: tl.constexpr,
    IS_LAYER: tl.constexpr, OFFSET: tl.constexpr, TURNED: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr, IS_SCALED: tl.constexpr
):  # fmt: skip
    """`HEADS` heads of some rows, each in two halves; grid (T / ROWS, heads / HEADS)."""
    WIDTH: tl.constexpr = HEAD_DIM // 2
    TYPE: tl.constexpr = qkv.dtype.element_ty
    m = tl.arange(0, ROWS * HEADS)
    row = (tl.program_id(0) * ROWS + m // HEADS).to(tl.int64)
    head = tl.program_id(1) * HEADS + m % HEADS
    is_row = row < count
    d = tl.arange(0, HALF)
    is_half = (d < WIDTH)[None, :]
    is_q, is_k = head < Q_HEADS, (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    is_cell = (is_row & (is_q | is_k | is_v))[:, None] & is_half
    place, apart = _pairs(d, WIDTH, TURNED, IS_INTERLEAVED)
    at = (row * (Q_HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM + place[None, :]
    first = tl.load(qkv + at, mask=is_cell, other=0.0)
    second = tl.load(qkv + at + apart, mask=is_cell, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORMS != "":
        a, b = _normed(
            a, b, q_norm, k_norm, place, apart, head, is_q, is_k, is_half, eps, Q_HEADS, KV_HEADS,
            HEAD_DIM, HEADS, ROWS, NORMS, IS_LAYER, OFFSET, TYPE
        )  # fmt: skip
    position = tl.load(positions + row, mask=is_row, other=0).to(tl.int64)
    turned, turned_too = _rotated(a, b, cos, sin, position, d, is_half, WIDTH, TURNED, TYPE)

    query, query_too = turned, turned_too
    if IS_SCALED:
        factor = tl.load(query_scales + position)[:, None]
        query = rounded(turned.to(tl.float32) * factor, TYPE)
        query_too = rounded(turned_too.to(tl.float32) * factor, TYPE)
    at = (row * Q_HEADS + head)[:, None] * HEAD_DIM + place[None, :]
    query_cell = (is_row & is_q)[:, None] & is_half
    tl.store(q + at, query, mask=query_cell)
    tl.store(q + at + apart, query_too, mask=query_cell)
    slot = tl.load(kv_slots + row, mask=is_row, other=-1).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    is_kept = slot >= 0
    kv_head = (head - Q_HEADS) % KV_HEADS
    entry = (block * KV_HEADS + kv_head) * BLOCK_SIZE + offset
    entry = entry[:, None] * HEAD_DIM + place[None, :]
    key_cell, value_cell = (is_k & is_kept)[:, None] & is_half, (is_v & is_kept)[:, None] & is_half
    tl.store(keys + entry, turned, mask=key_cell)
    tl.store(keys + entry + apart, turned_too, mask=key_cell)
    tl.store(values + entry, first, mask=value_cell)
    tl.store(values + entry + apart, second, mask=value_cell)


_LLAMA = HeadFormula(1e-5)
_SHAPES = {"llama_8b": (32, 8, 128), "smollm2": (9, 3, 64)}
_FAMILIES: dict[str, tuple[tuple[int, int, int], HeadFormula, dict[str, Any]]] = {
    "gemma3_12b": ((16, 8, 256), HeadFormula(1e-6, offset=1.0), {"has_norms": True, "turned": 128}),
    "olmo2_13b": (
        (40, 40, 128),
        HeadFormula(1e-6, NormSpan.ALL),
        {"has_norms": True, "turned": 64},
    ),
    "command_r_plus": (
        (96, 8, 128),
        HeadFormula(1e-5, NormSpan.EACH, is_layer=True, is_interleaved=True),
        {"has_norms": True, "turned": 64},
    ),
    "glm4": (
        (32, 2, 128),
        HeadFormula(1e-5, is_interleaved=True),
        {"has_norms": False, "turned": 32},
    ),
    "phi4_mini": ((24, 8, 128), _LLAMA, {"has_norms": False, "turned": 48}),
    "smollm3": ((16, 4, 128), _LLAMA, {"has_norms": False, "turned": 0}),
    "ministral3": ((32, 8, 128), _LLAMA, {"has_norms": False, "turned": 64, "is_scaled": True}),
}
"""Heads that are not normed and rotated as Llama's."""


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    found = []
    for model, shape in _SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for has_norms in (False, True):
                name = f"rope_cache_{model}_{TYPES[dtype]}" + ("_norms" if has_norms else "")
                options = {"has_norms": has_norms, "turned": shape[2] // 2}
                found.append(_rope_compilation(name, dtype, shape, _LLAMA, **options))
    for model, (shape, formula, options) in _FAMILIES.items():
        name = f"rope_cache_{model}_bf16"
        found.append(_rope_compilation(name, torch.bfloat16, shape, formula, **options))
    return found


def _rope_compilation(
    name: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    formula: HeadFormula,
    **given: Any,
) -> Compilation:
    constants, options = _rope_configuration(*heads, 32, formula=formula, **given)
    p = f"*{TYPES[dtype]}"
    return Compilation(
        _rope_cache,
        name,
        {
            "qkv": p,
            **dict.fromkeys(("positions", "kv_slots"), "*i32"),
            **dict.fromkeys(("cos", "sin", "query_scales"), "*fp32"),
            **dict.fromkeys(("q", "keys", "values", "q_norm", "k_norm"), p),
            "count": "i32",
            "eps": "fp32",
        },
        constants,
        **options,
        is_hot=True,
    )
