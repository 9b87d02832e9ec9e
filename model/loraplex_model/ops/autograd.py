"""The decoder's elementwise steps with derivatives written by hand, for training.

Autograd would keep every intermediate of a norm, a rotation or a gated product; these keep the
input and one number per row, or nothing. Their readers need not keep the result either: a
`Recompute` makes it again. Sums are taken in float32 at least, as in the plain formulas. On a CPU
in float32 and bfloat16, compiled kernels do the same in one pass over memory (`ops.elementwise`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loraplex_model.ops import elementwise, products


@dataclass(frozen=True, slots=True)
class Recompute:
    """A way to compute a tensor again from tensors that are kept anyway: `make(*sources)`."""

    make: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, Recompute]:
    """`weight * x / rms(x)` over the last axis (Zhang & Sennrich, arXiv 1910.07467).

    The result has the type `dtype` (None: x's). Differentiable in x only. Keeps x and one number
    per row.
    """
    dtype = dtype or x.dtype
    normed, scale = _RmsNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return normed, Recompute(partial(_normed, weight, dtype), (x, scale))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on heads x [T, heads, head_dim], with cos and sin [T, 1, head_dim / 2].

    Keeps the tables only: the derivative is the opposite rotation (Su et al., arXiv 2104.09864).
    """
    return rotate_first_(x.flatten(1).clone(), x.shape[1], cos, sin).view_as(x)


def rotate_first_(
    x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`rotate` in place, for the `heads` heads in the first columns of x [T, width]."""
    result: torch.Tensor = _RotateFirst.apply(x, heads, cos, sin)  # type: ignore[no-untyped-call]
    return result


def silu_mul(gate_up: torch.Tensor) -> tuple[torch.Tensor, Recompute]:
    """`silu(gate) * up`, with gate and up side by side: [T, 2 * width] -> [T, width].

    Keeps its input only (Shazeer, arXiv 2002.05202).
    """
    result: torch.Tensor = _SiluMul.apply(gate_up)  # type: ignore[no-untyped-call]
    return result, Recompute(_gated, (gate_up,))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: products.Attending
) -> torch.Tensor:
    """`products.attend`, differentiable: keeps its inputs, its result and a number per head."""
    result: torch.Tensor = _Attend.apply(q, k, v, how)  # type: ignore[no-untyped-call]
    return result


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the type in which sums are taken: float64 if x has it, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def _normed(
    weight: torch.Tensor, dtype: torch.dtype, x: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    if _in_one_pass(x, dtype):
        return elementwise.scaled(x, scale, weight.float(), dtype)
    return (wide(x) * scale).to(dtype).mul_(weight.to(dtype))


def _in_one_pass(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels normalise x and give the type."""
    known = dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32 and known and elementwise.usable(x)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _in_one_pass(x, dtype):
            normed, scale = elementwise.rms_norm(x, weight.float(), eps, dtype)
        else:
            scale = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
            normed = _normed(weight, dtype, x, scale)
        ctx.save_for_backward(x, scale)
        ctx.mark_non_differentiable(scale)
        ctx.weight = weight
        return normed, scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # With n = x * scale and h = g * weight: scale * (h - n * mean(h * n)).
        x, scale = ctx.saved_tensors
        if x.dtype == torch.float32 and elementwise.usable(x, grads[0]):
            weight = ctx.weight.float()
            return elementwise.rms_norm_backward(x, scale, weight, grads[0]), None, None, None
        normed = wide(x) * scale
        h = wide(grads[0]) * ctx.weight.to(normed.dtype)
        mean = torch.linalg.vecdot(h, normed).div_(x.shape[-1])[..., None]
        return h.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), None, None, None


class _RotateFirst(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        ctx.mark_dirty(x)
        _rotate_first_(x, heads, cos, sin)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        gradient = grads[0].clone(memory_format=torch.contiguous_format)
        _rotate_first_(gradient, ctx.heads, cos, sin, back=True)
        return gradient, None, None, None


def _rotate_first_(
    x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, back: bool = False
) -> None:
    if x.dtype == torch.bfloat16 and cos.dtype == torch.float32 and elementwise.usable(x, cos, sin):
        elementwise.rotate_(x, heads, cos, sin, back=back)
    else:
        _rotate_(_first(x, heads, cos), cos, -sin if back else sin)


def _first(x: torch.Tensor, heads: int, cos: torch.Tensor) -> torch.Tensor:
    """The first heads of x as a view [T, heads, head_dim]."""
    width = 2 * cos.shape[-1]
    return x[:, : heads * width].view(len(x), heads, width)


def _rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(crossed)
    return x


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    if elementwise.usable(gate_up):
        return elementwise.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # With s = sigmoid(gate): silu = gate * s, and its derivative s + silu * (1 - s).
        (gate_up,) = ctx.saved_tensors
        if elementwise.usable(gate_up, grads[0]):
            return elementwise.silu_mul_backward(gate_up, grads[0])
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        s = torch.sigmoid(gate)
        silu = gate * s
        torch.mul(grads[0], silu, out=d_up)
        silu.addcmul_(silu, s, value=-1).add_(s)
        torch.mul(silu, grads[0], out=d_gate)
        d_gate.mul_(up)
        return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        how: products.Attending,
    ) -> torch.Tensor:
        out, logs = products.attend(q, k, v, how)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, logs = ctx.saved_tensors
        return (*products.attend_back(q, k, v, ctx.how, (out, logs), grads[0]), None)
