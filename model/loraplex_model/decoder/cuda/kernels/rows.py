"""The steps that work on single rows: embedding, norms, the MLP's activation, scaled logits.

Sums are float32, and results are rounded to the compute type where Hugging Face rounds them. What a
family does differently from Llama is a constant, so kernels for Llama contain no code for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from loraplex_model.base.config import Gate
from loraplex_model.decoder.cuda.kernels.common import (
    INTERPRETED,
    TYPES,
    Compilation,
    activated,
    rounded,
    softcapped,
)

_ROWS = 16 if INTERPRETED else 1
"""Rows of a program. The interpreter's time goes by the number of programs, a device's does not."""
_BLOCK = 1024  # columns of a program, in kernels whose columns are independent


def embed(
    tokens: torch.Tensor,
    table: torch.Tensor,
    last_tokens: torch.Tensor,
    out: torch.Tensor,
    scale: float = 1.0,
) -> None:
    """Writes the embedding of each token, and zeros for a token that has none.

    Args:
        tokens: int32 [T]; -1 - k stands for the token in `last_tokens[k]`. An id of `vocab` or more
            is a virtual token, which has no embedding, and so has a negative id in `last_tokens`.
        table: [vocab, hidden].
        last_tokens: int32 [D], tokens that were drawn on the device.
        out: [T, hidden] in the type of the table.
        scale: factor on embeddings, a number of the type of the table.
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
        SCALE=scale,
    )


def norm_residual(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    normed: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
    *,
    second: torch.Tensor | None = None,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    offset: float = 0.0,
    is_layer: bool = False,
) -> None:
    """Adds blocks' results to the residual stream, and norms it: `rmsnorm(x + delta) * weight`.

    Args:
        x: [T, hidden], the residual stream; becomes `x + delta` unless `rows` is given.
        delta: [T, hidden]; None for zeros.
        weight: [hidden]; None if nothing is normed, and `normed` is left as it is.
        normed: [T, hidden], or [R, hidden] with `rows`; may be x without a delta.
        rows: int32 [R], the rows of x and delta that are normed; row r of `normed` belongs to row
            `rows[r]` of x. A negative number is padding, and its row of `normed` is left as it is.
        second: [T, hidden], what is added after delta; None for zeros.
        scale: factor on delta and on `second`.
        bias: [hidden], added to the result; None for zeros.
        offset: added to the weight.
        is_layer: whether the mean is subtracted before, as LayerNorm does.
    """
    hidden = x.shape[1]
    given = (x, delta, second, weight, bias, normed)
    for tensor in (each for each in given if each is not None):
        assert tensor.is_contiguous()
        assert tensor.dtype == x.dtype
    assert second is None or delta is not None
    constants, options = _norm_configuration(
        hidden,
        delta is not None,
        rows is not None,
        HAS_SECOND=second is not None,
        SCALE=scale,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        OFFSET=offset,
        IS_LAYER=is_layer,
    )
    _norm_residual[(triton.cdiv(len(normed), _ROWS),)](
        x,
        x if delta is None else delta,
        x if second is None else second,
        x if weight is None else weight,
        x if bias is None else bias,
        normed,
        x if rows is None else rows,
        len(normed),
        eps,
        **constants,
        **options,
    )


def activate(
    up: torch.Tensor, out: torch.Tensor, gate: Gate = Gate.SILU, *, is_gated: bool = True
) -> None:
    """Writes `gate(a) * b` for up [T, 2 * width], which is a and b side by side, to out [T, width].

    Without a gate, up is [T, width], and `gate(up)` is written. Both are contiguous.
    """
    width = out.shape[1]
    assert up.shape == (len(out), (1 + is_gated) * width)
    assert up.is_contiguous()
    assert out.is_contiguous()
    grid = (triton.cdiv(len(out), _ROWS), triton.cdiv(width, _BLOCK))
    _activate[grid](
        up,
        out,
        len(out),
        WIDTH=width,
        BLOCK=_BLOCK,
        ROWS=_ROWS,
        KIND=gate.value,
        IS_GATED=is_gated,
    )


def finish_logits(logits: torch.Tensor, scale: float, cap: float) -> None:
    """Multiplies logits, float32 [R, vocab], and presses them into (-cap, cap), in place.

    `cap` is c in `c * tanh(logit / c)`; 0 leaves this out.
    """
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    count, vocab = logits.shape
    grid = (triton.cdiv(count, _ROWS), triton.cdiv(vocab, _BLOCK))
    _finish_logits[grid](
        logits, count, vocab, SCALE=scale, CAP=float(cap), BLOCK=_BLOCK, ROWS=_ROWS
    )


def _norm_configuration(
    hidden: int, has_delta: bool, has_rows: bool, **others: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of `_norm_residual` and the options of its launch; `others` are those of a family.

    Those that are not given are Llama's.
    """
    block = triton.next_power_of_2(hidden)
    constants = {
        "HIDDEN": hidden,
        "BLOCK": block,
        "HAS_DELTA": has_delta,
        "HAS_ROWS": has_rows,
        "ROWS": _ROWS,
        "HAS_SECOND": False,
        "SCALE": 1.0,
        "HAS_WEIGHT": True,
        "HAS_BIAS": False,
        "OFFSET": 0.0,
        "IS_LAYER": False,
    }
    return constants | others, {"num_warps": min(max(block // 512, 4), 16)}


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
    SCALE: tl.constexpr,
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
    if SCALE != 1.0:
        state = rounded(state.to(tl.float32) * SCALE, out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * HIDDEN + d[None, :], state, mask=is_cell)


@triton.jit(do_not_specialize=["count"])
def _norm_residual(
    x, delta, second, weight, bias, normed, rows, count, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_ROWS: tl.constexpr,
    ROWS: tl.constexpr, HAS_SECOND: tl.constexpr, SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, OFFSET: tl.constexpr, IS_LAYER: tl.constexpr
):  # fmt: skip
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
        added = _scaled(tl.load(delta + at, mask=is_cell, other=0.0), SCALE, TYPE)
        state = rounded(state.to(tl.float32) + added, TYPE)
        if HAS_SECOND:
            added = _scaled(tl.load(second + at, mask=is_cell, other=0.0), SCALE, TYPE)
            state = rounded(state.to(tl.float32) + added, TYPE)
        if not HAS_ROWS:
            tl.store(x + at, state, mask=is_cell)
    if HAS_WEIGHT:
        wide = state.to(tl.float32)
        if IS_LAYER:
            wide = tl.where(is_cell, wide - (tl.sum(wide, 1) / HIDDEN)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / HIDDEN + eps)
        if IS_LAYER or OFFSET != 0.0:  # rounded once
            factor = tl.load(weight + d, mask=d < HIDDEN, other=0.0).to(tl.float32)
            result = wide * scale[:, None] * (factor + OFFSET)[None, :]
            if HAS_BIAS:
                result += tl.load(bias + d, mask=d < HIDDEN, other=0.0).to(tl.float32)[None, :]
            result = rounded(result, TYPE)
        else:
            unit = rounded(wide * scale[:, None], TYPE)
            factor = tl.load(weight + d, mask=d < HIDDEN, other=0.0).to(tl.float32)
            result = rounded(unit.to(tl.float32) * factor[None, :], TYPE)
        at = target.to(tl.int64)[:, None] * HIDDEN + d[None, :]
        tl.store(normed + at, result, mask=is_cell)


@triton.jit
def _scaled(x, SCALE: tl.constexpr, TYPE: tl.constexpr):
    """Numbers of a type times a factor, as float32 numbers that are rounded to the type."""
    if SCALE == 1.0:
        return x.to(tl.float32)
    else:
        return rounded(x.to(tl.float32) * SCALE, TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _activate(
    up, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, IS_GATED: tl.constexpr
):  # fmt: skip
    """A block of columns of some rows; grid (T / ROWS, width / BLOCK)."""
    TYPE: tl.constexpr = out.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_cell = (row < count)[:, None] & (d < WIDTH)[None, :]
    if IS_GATED:
        at = up + row[:, None] * 2 * WIDTH + d[None, :]
        gate = tl.load(at, mask=is_cell, other=0.0).to(tl.float32)
        own = tl.load(at + WIDTH, mask=is_cell, other=0.0).to(tl.float32)
        active = rounded(activated(gate, KIND), TYPE).to(tl.float32)
        result = rounded(active * own, TYPE)
    else:
        own = tl.load(up + row[:, None] * WIDTH + d[None, :], mask=is_cell, other=0.0)
        result = rounded(activated(own.to(tl.float32), KIND), TYPE)
    tl.store(out + row[:, None] * WIDTH + d[None, :], result, mask=is_cell)


@triton.jit(do_not_specialize=["count", "vocab"])
def _finish_logits(
    logits, count, vocab, SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr
):  # fmt: skip
    """A block of columns of some rows; grid (R / ROWS, vocab / BLOCK)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_cell = (row < count)[:, None] & (d < vocab)[None, :]
    at = logits + row[:, None] * vocab + d[None, :]
    result = tl.load(at, mask=is_cell, other=0.0) * SCALE
    if CAP != 0.0:
        result = softcapped(result, CAP)
    tl.store(at, result, mask=is_cell)


_SHAPES = {"llama_8b": (4096, 14336), "smollm2": (576, 1536)}
_FAMILIES: Mapping[str, tuple[int, dict[str, Any]]] = {
    "gemma2_9b": (3584, {"OFFSET": 1.0}),
    "granite_8b": (4096, {"SCALE": 0.22}),
    "starcoder2_15b": (6144, {"IS_LAYER": True, "HAS_BIAS": True}),
    "command_r": (8192, {"IS_LAYER": True, "HAS_SECOND": True}),
    "olmo2_13b": (5120, {"HAS_WEIGHT": False}),
}
"""Norms that are not as Llama's: size and constants."""


def compilations() -> list[Compilation]:
    """The configurations that `make gpu-aot` compiles."""
    found = []
    for model, (hidden, intermediate) in _SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(TYPES[dtype])
            p, name = f"*{kind}", f"{model}_{kind}"
            tokens = {"tokens": "*i32", "table": p, "last_tokens": "*i32", "out": p}
            numbers = dict.fromkeys(("count", "vocab", "drawn"), "i32")
            constants = {"HIDDEN": hidden, "BLOCK": _BLOCK, "ROWS": _ROWS, "SCALE": 1.0}
            found += [
                Compilation(_embed, f"embed_{name}", tokens | numbers, constants),
                _activate_compilation(f"activate_{name}", p, intermediate, Gate.SILU),
                *(_norm_compilation(hidden, p, name, has_rows) for has_rows in (False, True)),
            ]
    for model, (hidden, others) in _FAMILIES.items():
        found.append(_norm_compilation(hidden, "*bf16", f"{model}_bf16", False, **others))
    for gate in (Gate.GELU, Gate.GELU_TANH):
        for is_gated in (False, True):
            name = f"activate_{gate.value}{'' if is_gated else '_alone'}_bf16"
            found.append(_activate_compilation(name, "*bf16", 14336, gate, is_gated))
    constants = {"SCALE": 0.0625, "CAP": 30.0, "BLOCK": _BLOCK, "ROWS": _ROWS}
    signature = {"logits": "*fp32", "count": "i32", "vocab": "i32"}
    found.append(Compilation(_finish_logits, "finish_logits", signature, constants))
    return found


def _activate_compilation(
    name: str, p: str, width: int, gate: Gate, is_gated: bool = True
) -> Compilation:
    constants: dict[str, Any] = {"WIDTH": width, "BLOCK": _BLOCK, "ROWS": _ROWS}
    constants |= {"KIND": gate.value, "IS_GATED": is_gated}
    signature = {"up": p, "out": p, "count": "i32"}
    return Compilation(_activate, name, signature, constants, is_hot=True)


def _norm_compilation(hidden: int, p: str, name: str, has_rows: bool, **others: Any) -> Compilation:
    constants, options = _norm_configuration(hidden, True, has_rows, **others)
    return Compilation(
        _norm_residual,
        f"norm_residual_{name}" + ("_rows" if has_rows else ""),
        {
            **dict.fromkeys(("x", "delta", "second", "weight", "bias", "normed"), p),
            "rows": "*i32" if has_rows else p,
            "count": "i32",
            "eps": "fp32",
        },
        constants,
        **options,
        is_hot=True,
    )
