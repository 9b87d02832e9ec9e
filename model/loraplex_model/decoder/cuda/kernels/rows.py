"""The steps of a layer that work on single rows: embedding, norms, rotation, SiLU.

Sums are float32, and results are rounded to the compute type where Hugging Face rounds them, except
that a rotation is rounded once instead of after each product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from loraplex_model.decoder.cuda.kernels.common import INTERPRETED, TYPES, Compilation, rounded

_ROWS = 16 if INTERPRETED else 1
"""Rows of a program. The interpreter's time goes by the number of programs, a device's does not."""
_BLOCK = 1024  # columns of a program, in kernels whose columns are independent
_HEADS = 8  # heads of a program that rotates


def embed(
    tokens: torch.Tensor, table: torch.Tensor, last_tokens: torch.Tensor, out: torch.Tensor
) -> None:
    """Writes the embedding of each token, and zeros for a token that has none.

    Args:
        tokens: int32 [T]; -1 - k stands for the token in `last_tokens[k]`. An id of `vocab` or more
            is a virtual token, which has no embedding, and so has a negative id in `last_tokens`.
        table: [vocab, hidden].
        last_tokens: int32 [D], tokens that were drawn on the device.
        out: [T, hidden] in the type of the table.
    """
    assert out.is_contiguous()
    assert table.is_contiguous()
    vocab, hidden = table.shape
    grid = (triton.cdiv(len(out), _ROWS), triton.cdiv(hidden, _BLOCK))
    _embed[grid](
        tokens,
        table,
        last_tokens,
        out,
        len(out),
        vocab,
        len(last_tokens),
        HIDDEN=hidden,
        BLOCK=_BLOCK,
        ROWS=_ROWS,
    )


def norm_residual(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> None:
    """Adds a block's result to the residual stream, and norms it: `rmsnorm(x + delta) * weight`.

    Args:
        x: [T, hidden], the residual stream; becomes `x + delta` unless `rows` is given.
        delta: [T, hidden]; None for zeros.
        weight: [hidden].
        normed: [T, hidden], or [R, hidden] with `rows`.
        rows: int32 [R], the rows of x and delta that are normed; row r of `normed` belongs to row
            `rows[r]` of x. A negative number is padding, and its row of `normed` is left as it is.
    """
    hidden = x.shape[1]
    for tensor in (x, weight, normed, *(() if delta is None else (delta,))):
        assert tensor.is_contiguous()
        assert tensor.dtype == x.dtype
    constants, options = _norm_configuration(hidden, delta is not None, rows is not None)
    _norm_residual[(triton.cdiv(len(normed), _ROWS),)](
        x,
        x if delta is None else delta,
        weight,
        normed,
        x if rows is None else rows,
        len(normed),
        eps,
        **constants,
        **options,
    )


def rope_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """Norms the heads if the model does, rotates queries and keys, and fills the cache.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim]: queries, keys and values of each row.
        positions: int32 [T].
        kv_slots: int32 [T], `block * block_size + offset` of each row in the cache; a row with a
            negative slot is not written to the cache.
        cos, sin: float32 [positions, head_dim / 2], with the model's scale; see `ops.rope`.
        q: [T, heads, head_dim], the rotated queries.
        keys, values: [blocks, kv_heads, block_size, head_dim].
        q_norm, k_norm: [head_dim], weights of the norms of heads; None without them.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = keys.shape
    assert (q_norm is None) == (k_norm is None)
    assert qkv.shape[1] == (heads + 2 * kv_heads) * head_dim
    assert cos.shape[1] == sin.shape[1] == head_dim // 2
    for tensor in (qkv, q, keys, values, cos, sin):
        assert tensor.is_contiguous()
    constants, options = _rope_configuration(
        heads, kv_heads, head_dim, block_size, q_norm is not None
    )
    _rope_cache[(triton.cdiv(len(q), _ROWS), triton.cdiv(heads + 2 * kv_heads, _HEADS))](
        qkv,
        positions,
        kv_slots,
        cos,
        sin,
        q,
        keys,
        values,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        len(q),
        eps,
        **constants,
        **options,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `silu(gate) * up` for gate_up [T, 2 * width] to out [T, width], both contiguous."""
    width = out.shape[1]
    assert gate_up.shape == (len(out), 2 * width)
    assert gate_up.is_contiguous()
    assert out.is_contiguous()
    grid = (triton.cdiv(len(out), _ROWS), triton.cdiv(width, _BLOCK))
    _silu_mul[grid](gate_up, out, len(out), WIDTH=width, BLOCK=_BLOCK, ROWS=_ROWS)


def _norm_configuration(
    hidden: int, has_delta: bool, has_rows: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    block = triton.next_power_of_2(hidden)
    constants = {"HIDDEN": hidden, "BLOCK": block, "HAS_DELTA": has_delta, "HAS_ROWS": has_rows}
    constants["ROWS"] = _ROWS
    return constants, {"num_warps": min(max(block // 512, 4), 16)}


def _rope_configuration(
    heads: int, kv_heads: int, head_dim: int, block_size: int, has_norms: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    constants = {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": triton.next_power_of_2(head_dim // 2),
        "BLOCK_SIZE": block_size,
        "HEADS": _HEADS,
        "ROWS": _ROWS,
        "HAS_NORMS": has_norms,
    }
    return constants, {"num_warps": 4}


@triton.jit(do_not_specialize=["count", "vocab", "drawn"])
def _embed(
    tokens,
    table,
    last_tokens,
    out,
    count,
    vocab,
    drawn,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A block of columns of some rows; grid (T / ROWS, hidden / BLOCK)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < count
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_cell = is_row[:, None] & (d < HIDDEN)[None, :]
    given = tl.load(tokens + row, mask=is_row, other=0)
    last = -1 - given
    last_token = tl.load(last_tokens + last, mask=(last >= 0) & (last < drawn), other=-1)
    token = tl.where(given < 0, last_token, given)
    has_embedding = (token >= 0) & (token < vocab)
    at = table + token.to(tl.int64)[:, None] * HIDDEN + d[None, :]
    state = tl.load(at, mask=has_embedding[:, None] & is_cell, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * HIDDEN + d[None, :], state, mask=is_cell)


@triton.jit(do_not_specialize=["count"])
def _norm_residual(
    x,
    delta,
    weight,
    normed,
    rows,
    count,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some whole rows; grid (T / ROWS) or, with rows, (R / ROWS)."""
    TYPE: tl.constexpr = x.dtype.element_ty
    target = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = target < count
    source = target
    if HAS_ROWS:
        source = tl.load(rows + target, mask=is_row, other=-1)
        is_row &= source >= 0
    d = tl.arange(0, BLOCK)
    is_cell = is_row[:, None] & (d < HIDDEN)[None, :]
    at = source.to(tl.int64)[:, None] * HIDDEN + d[None, :]
    state = tl.load(x + at, mask=is_cell, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + at, mask=is_cell, other=0.0)
        state = rounded(state.to(tl.float32) + added.to(tl.float32), TYPE)
        if not HAS_ROWS:
            tl.store(x + at, state, mask=is_cell)
    wide = state.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / HIDDEN + eps)
    unit = rounded(wide * scale[:, None], TYPE)
    factor = tl.load(weight + d, mask=d < HIDDEN, other=0.0).to(tl.float32)
    result = rounded(unit.to(tl.float32) * factor[None, :], TYPE)
    tl.store(normed + target.to(tl.int64)[:, None] * HIDDEN + d[None, :], result, mask=is_cell)


@triton.jit
def _weighted(unit, q_weight, k_weight, q_cell, k_cell, TYPE: tl.constexpr):
    """Normed halves of heads times their weights; those of values become 0."""
    # for every cell at most one of the two loads is not masked
    weight = tl.load(q_weight, mask=q_cell, other=0.0).to(tl.float32)
    weight += tl.load(k_weight, mask=k_cell, other=0.0).to(tl.float32)
    return rounded(rounded(unit, TYPE).to(tl.float32) * weight, TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _rope_cache(
    qkv, positions, kv_slots, cos, sin, q, keys, values, q_norm, k_norm, count, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, HAS_NORMS: tl.constexpr
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
    at = (row * (Q_HEADS + 2 * KV_HEADS) + head)[:, None] * HEAD_DIM + d[None, :]
    first = tl.load(qkv + at, mask=is_cell, other=0.0)
    second = tl.load(qkv + at + WIDTH, mask=is_cell, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        q_cell, k_cell = is_q[:, None] & is_half, is_k[:, None] & is_half
        d_ = d[None, :] + (head * 0)[:, None]
        a = _weighted(a * scale, q_norm + d_, k_norm + d_, q_cell, k_cell, TYPE)
        b = _weighted(b * scale, q_norm + d_ + WIDTH, k_norm + d_ + WIDTH, q_cell, k_cell, TYPE)
    position = tl.load(positions + row, mask=is_row, other=0).to(tl.int64)
    angle = position[:, None] * WIDTH + d[None, :]
    c = tl.load(cos + angle, mask=is_half, other=0.0)
    s = tl.load(sin + angle, mask=is_half, other=0.0)
    turned, turned_too = rounded(a * c - b * s, TYPE), rounded(b * c + a * s, TYPE)

    query = (row * Q_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(q + query, turned, mask=(is_row & is_q)[:, None] & is_half)
    tl.store(q + query + WIDTH, turned_too, mask=(is_row & is_q)[:, None] & is_half)
    slot = tl.load(kv_slots + row, mask=is_row, other=-1).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    is_kept = slot >= 0
    kv_head = (head - Q_HEADS) % KV_HEADS
    place = (block * KV_HEADS + kv_head) * BLOCK_SIZE + offset
    place = place[:, None] * HEAD_DIM + d[None, :]
    key_cell, value_cell = (is_k & is_kept)[:, None] & is_half, (is_v & is_kept)[:, None] & is_half
    tl.store(keys + place, turned, mask=key_cell)
    tl.store(keys + place + WIDTH, turned_too, mask=key_cell)
    tl.store(values + place, first, mask=value_cell)
    tl.store(values + place + WIDTH, second, mask=value_cell)


@triton.jit(do_not_specialize=["count"])
def _silu_mul(gate_up, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A block of columns of some rows; grid (T / ROWS, width / BLOCK)."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_cell = (row < count)[:, None] & (d < WIDTH)[None, :]
    at = gate_up + row[:, None] * 2 * WIDTH + d[None, :]
    gate = tl.load(at, mask=is_cell, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=is_cell, other=0.0).to(tl.float32)
    active = rounded(gate / (1.0 + tl.exp(-gate)), TYPE).to(tl.float32)
    tl.store(out + row[:, None] * WIDTH + d[None, :], rounded(active * up, TYPE), mask=is_cell)


_SHAPES = {"llama_8b": (4096, 14336, 32, 8, 128), "smollm2": (576, 1536, 9, 3, 64)}


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    found = []
    for model, (hidden, intermediate, *heads) in _SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(TYPES[dtype])
            p, name = f"*{kind}", f"{model}_{kind}"
            tokens = {"tokens": "*i32", "table": p, "last_tokens": "*i32", "out": p}
            numbers = dict.fromkeys(("count", "vocab", "drawn"), "i32")
            constants = {"BLOCK": _BLOCK, "ROWS": _ROWS}
            found += [
                Compilation(
                    _embed, f"embed_{name}", tokens | numbers, {"HIDDEN": hidden, **constants}
                ),
                Compilation(
                    _silu_mul,
                    f"silu_mul_{name}",
                    {"gate_up": p, "out": p, "count": "i32"},
                    {"WIDTH": intermediate, **constants},
                    is_hot=True,
                ),
                *(_norm_compilation(hidden, p, name, has_rows) for has_rows in (False, True)),
                *(_rope_compilation(*heads, p, name, has_norms) for has_norms in (False, True)),
            ]
    return found


def _norm_compilation(hidden: int, p: str, name: str, has_rows: bool) -> Compilation:
    constants, options = _norm_configuration(hidden, True, has_rows)
    return Compilation(
        _norm_residual,
        f"norm_residual_{name}" + ("_rows" if has_rows else ""),
        {
            **dict.fromkeys(("x", "delta", "weight", "normed"), p),
            "rows": "*i32" if has_rows else p,
            "count": "i32",
            "eps": "fp32",
        },
        constants,
        **options,
        is_hot=True,
    )


def _rope_compilation(
    heads: int, kv_heads: int, head_dim: int, p: str, name: str, has_norms: bool
) -> Compilation:
    constants, options = _rope_configuration(heads, kv_heads, head_dim, 32, has_norms)
    return Compilation(
        _rope_cache,
        f"rope_cache_{name}" + ("_norms" if has_norms else ""),
        {
            "qkv": p,
            **dict.fromkeys(("positions", "kv_slots"), "*i32"),
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            **dict.fromkeys(("q", "keys", "values", "q_norm", "k_norm"), p),
            "count": "i32",
            "eps": "fp32",
        },
        constants,
        **options,
        is_hot=True,
    )
