"""Elementwise steps of training in compiled kernels, each one pass over memory, on all threads.

Tensors are float32, on the CPU and contiguous; leading axes are rows. `autograd` has the same steps
in torch for all other tensors, and the formulas of the derivatives.
"""

from __future__ import annotations

from ctypes import c_float, c_void_p
from functools import cache

import torch

from loraplex_model.ops import build


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the functions below accept these tensors and the kernels are available."""
    fit = all(t.dtype == torch.float32 and not t.is_cuda and t.is_contiguous() for t in tensors)
    return fit and _library() is not None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight * x * scale`, and `scale = 1 / rms(x)` [..., 1]."""
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    _call("rms_norm", _at(x), _at(weight), c_float(eps), *_sizes(x), _at(scale), _at(out))
    return out, scale


def scaled(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weight * x * scale`, where `scale` has one number per row."""
    out = torch.empty_like(x)
    _call("scaled", _at(x), _at(scale), _at(weight), *_sizes(x), _at(out))
    return out


def rms_norm_backward(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Gradient of `rms_norm` with respect to x; `gradient` is that of its result."""
    out = torch.empty_like(x)
    _call(
        "rms_norm_backward", _at(x), _at(scale), _at(weight), _at(gradient), *_sizes(x), _at(out)
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, with gate and up side by side: [T, 2 * width] -> [T, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _call("silu_mul", _at(gate_up), rows, width, _at(out))
    return out


def silu_mul_backward(gate_up: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Gradient [T, 2 * width] of `silu_mul` with respect to its input."""
    out = torch.empty_like(gate_up)
    _call("silu_mul_backward", _at(gate_up), _at(gradient), *_sizes(gradient), _at(out))
    return out


@cache
def _library() -> build.Kernels | None:
    try:
        return build.load()
    except build.KernelsUnavailable:
        return None  # `unpack.kernel` logs the warning


def _call(name: str, *arguments: object) -> None:
    getattr(_library(), f"loraplex_train_{name}")(*arguments, torch.get_num_threads())


def _at(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _sizes(tensor: torch.Tensor) -> tuple[int, int]:
    width = tensor.shape[-1]
    return tensor.numel() // max(width, 1), width
