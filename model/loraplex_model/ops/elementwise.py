"""Elementwise steps of training in compiled kernels, each one pass over memory, on all threads.

Tensors are on the CPU and contiguous; leading axes are rows. The residual stream is float32; what
products read and give is float32 or bfloat16. `autograd` has the same steps in torch for all other
tensors, and the formulas of the derivatives.
"""

from __future__ import annotations

from ctypes import c_float, c_void_p
from functools import cache

import torch

from loraplex_model.ops import build

_TYPES = (torch.float32, torch.bfloat16)


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the functions below accept these tensors and the kernels are available."""
    fit = all(t.dtype in _TYPES and not t.is_cuda and t.is_contiguous() for t in tensors)
    return fit and _library() is not None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * x * scale` in `dtype`, and `scale = 1 / rms(x)` [..., 1]; x and weight float32."""
    _check(x, weight)
    out, scale = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1)
    sizes = _sizes(x)
    _call("rms_norm", _at(x), _at(weight), c_float(eps), *sizes, _at(scale), _at(out), _narrow(out))
    return out, scale


def scaled(
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`weight * x * scale` in `dtype`, where `scale` has one number per row; inputs float32."""
    _check(x, scale, weight)
    out = torch.empty_like(x, dtype=dtype)
    _call("scaled", _at(x), _at(scale), _at(weight), *_sizes(x), _at(out), _narrow(out))
    return out


def rms_norm_backward(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Gradient of `rms_norm` with respect to x, float32; `gradient` is that of its result."""
    _check(x, scale, weight)
    out = torch.empty_like(x)
    inputs = _at(x), _at(scale), _at(weight), _at(gradient)
    _call("rms_norm_backward", *inputs, *_sizes(x), _at(out), _narrow(gradient))
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, with gate and up side by side: [T, 2 * width] -> [T, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _call("silu_mul", _at(gate_up), rows, width, _at(out), _narrow(out))
    return out


def silu_mul_backward(gate_up: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient [T, 2 * width] of `silu_mul` with respect to its input, which has its type."""
    assert gate_up.dtype == gradient.dtype
    out = torch.empty_like(gate_up)
    sizes = _sizes(gradient)
    _call("silu_mul_backward", _at(gate_up), _at(gradient), *sizes, _at(out), _narrow(out))
    return out


def rotate_(
    x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False
) -> None:
    """Rotates the first heads of x [T, width], bfloat16, in place; cos and sin float32.

    With `back` in the opposite direction.
    """
    assert x.dtype == torch.bfloat16
    _check(cos, sin)
    sizes = *_sizes(x), heads, cos.shape[-1]
    _call("rotate", _at(x), *sizes, _at(cos), _at(sin), c_float(-1 if back else 1))


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor, *, slope: bool) -> torch.Tensor:
    """Cross-entropy, float32 [rows], of scores bfloat16 [rows, vocab] at int64 targets [rows].

    With `slope` the scores become its derivative: the softmax minus one at the target.
    """
    assert scores.dtype == torch.bfloat16
    assert targets.dtype == torch.int64
    losses = scores.new_empty(len(scores), dtype=torch.float32)
    inputs = _at(scores), _at(targets), *_sizes(scores)
    if _call("cross_entropy", *inputs, int(slope), _at(losses)):
        raise MemoryError("no memory for the kernel `cross_entropy` of a training pass")
    return losses


@cache
def _library() -> build.Kernels | None:
    try:
        return build.load()
    except build.KernelsUnavailable:
        return None  # `unpack.kernel` logs the warning


def _call(name: str, *arguments: object) -> int:
    """What the kernel returns, which has a meaning for those that allocate: a `Fault`."""
    found: int = getattr(_library(), f"loraplex_train_{name}")(*arguments, torch.get_num_threads())
    return found


def _check(*tensors: torch.Tensor) -> None:
    assert all(tensor.dtype == torch.float32 for tensor in tensors)


def _narrow(tensor: torch.Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def _at(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _sizes(tensor: torch.Tensor) -> tuple[int, int]:
    width = tensor.shape[-1]
    return tensor.numel() // max(width, 1), width
