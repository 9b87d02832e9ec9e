"""What the kernels should compute, in float64 and one row or matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.base.batch import Mix
from loraplex_model.decoder.attention import Scoring


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; NaN if `found` has a NaN."""
    found, wanted = found.double(), wanted.double()
    scale = wanted.norm().item()
    return (found - wanted).norm().item() / (scale or 1.0)


def with_adapters(
    x: torch.Tensor,
    y: torch.Tensor,
    mixes: Sequence[Mix],
    deltas: dict[int, AdapterDelta],
    layer: int,
    modules: Sequence[str],
    widths: Sequence[int],
) -> torch.Tensor:
    """`gain * y + sum w (B A x + bias)` for each row x [T, in] and its mix; y is [T, out]."""
    wanted = y.double().clone()
    for row, mix in enumerate(mixes):
        start = 0
        for module, width in zip(modules, widths, strict=True):
            part = wanted[row, start : start + width]
            changes: list[tuple[float, ProjectionDelta]] = []
            for slot, weight in mix:
                change = deltas[slot].sites.get((layer, module))
                assert change is None or isinstance(change, ProjectionDelta)
                if change is not None:
                    changes.append((weight, change))
            gain = torch.ones_like(part)
            for weight, change in changes:
                if change.gain is not None:
                    gain += weight * (change.gain.double() - 1)
            part *= gain
            for weight, change in changes:
                if change.factors is not None:
                    a, b = (factor.double() for factor in change.factors)
                    part += weight * ((a @ x[row].double()) @ b)
                if change.bias is not None:
                    part += weight * change.bias.double()
            start += width
    return wanted


def attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: Sequence[int],
    positions: Sequence[int],
    scoring: Scoring,
) -> torch.Tensor:
    """Attention of rows q [T, heads, head_dim] of one sequence at the given positions.

    keys and values are [blocks, kv_heads, block_size, head_dim]; `blocks` are the sequence's.
    """
    heads, kv_heads = q.shape[1], keys.shape[1]
    at = torch.tensor(list(blocks), device=keys.device)
    k, v = (cache[at].transpose(0, 1).flatten(1, 2).double() for cache in (keys, values))
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))  # [heads, tokens, head_dim]
    rows = []
    for row, position in zip(q.double(), positions, strict=True):
        first = 0 if scoring.window is None else max(0, position - scoring.window + 1)
        seen = slice(first, position + 1)
        scores = torch.einsum("hd,htd->ht", row, k[:, seen]) * scoring.scale
        if scoring.softcap:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(1), v[:, seen]))
    return torch.stack(rows)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension."""
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads x [T, heads, head_dim] rotated by cos and sin [T, head_dim / 2]."""
    first, second = x.double().chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), -1)


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [T, 2 * width]."""
    gate, up = gate_up.double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
