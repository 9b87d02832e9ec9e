"""What all kernels share: the interpreter's types, and how a configuration is described."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on tensors in host memory."""

TYPES: Mapping[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Triton's type for each compute type of a decoder."""


def product_type(dtype: torch.dtype) -> Any:
    """The type of the operands of `tl.dot` for activations of `dtype`.

    The interpreter multiplies the bit patterns of bfloat16 numbers instead of the numbers, and
    reports no error, so there the operands are float32.
    """
    return tl.float32 if INTERPRETED else TYPES[dtype]


def product_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: without it float32 operands are rounded to ten bits."""
    return "ieee" if dtype == torch.float32 else "tf32"


_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """Float32 numbers in a type of activations, rounded to nearest, ties to even.

    `x.to(TYPE)` does so on a device; the interpreter leaves out the lower bits of bfloat16.
    """
    if _INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The MLP's activation of float32 numbers; KIND is a value of `Gate`."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # 1 + tanh(u) is 2 / (1 + exp(-2 u))
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-twice))


@triton.jit
def softcapped(x, CAP: tl.constexpr):
    """`CAP * tanh(x / CAP)` of float32 numbers."""
    return CAP - (2.0 * CAP) / (tl.exp2(x * (2.8853900817779268 / CAP)) + 1.0)


TARGETS = (80, 90, 120)
"""Compute capabilities, times ten, for which kernels are compiled ahead of time."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """One configuration of one kernel, as `make gpu-aot` compiles it.

    Attributes:
        kernel: the function under `triton.jit`.
        name: name of the configuration, unique among all kernels.
        signature: type of each argument that is no constant, such as "*bf16" or "i32".
        constants: values of the constant arguments.
        is_hot: the kernel runs in every layer of a step, so it may not spill registers.
        is_fused: the compiler may join a multiplication and an addition, with one rounding.
        targets: compute capabilities, times ten, of the devices that use the configuration.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    is_hot: bool = False
    is_fused: bool = True
    targets: tuple[int, ...] = TARGETS
