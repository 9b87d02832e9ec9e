"""`W x` over NF4 weights, in torch: four ways with one contract.

Each takes `(matrix, x [T, in])` and returns [T, out] in the type of `x`, differentiable in `x`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import nf4
from loraplex_model.ops.nf4 import absmax_float, dequantize, nf4_code

TILE = 16
"""Rows in one CPU matrix product. Libraries choose their code path, and with it the order of a sum,
by the number of rows; always the same number gives a row the same bits whatever its neighbours."""


class BaseLinear(Protocol):
    """Multiplies by a base matrix. [T, in] -> [T, out]."""

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor: ...


def by_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`; on the CPU in tiles of `TILE` rows, the last padded with zeros."""
    rows = x.shape[0]
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x @ weight.T
    tiled = torch.nn.functional.pad(x, (0, 0, 0, -rows % TILE))
    out = x.new_empty(tiled.shape[0], weight.shape[0])
    for start in range(0, tiled.shape[0], TILE):
        torch.mm(tiled[start : start + TILE], weight.T, out=out[start : start + TILE])
    return out[:rows]


class DequantisedLinear:
    """Unpacks the matrix for every product (again in the backward pass), keeping nothing."""

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        if not torch.is_grad_enabled():
            return by_tiles(x, dequantize(matrix).to(x.dtype))
        result: torch.Tensor = _Unpacked.apply(x, matrix, dequantize)  # type: ignore[no-untyped-call]
        return result


class _Unpacked(torch.autograd.Function):
    """The weight is a constant, so only the gradient for x exists: `W.T g`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        matrix: NF4Matrix,
        unpack: Callable[[NF4Matrix], torch.Tensor],
    ) -> torch.Tensor:
        ctx.matrix, ctx.unpack = matrix, unpack
        return x @ unpack(matrix).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.unpack(ctx.matrix).to(grads[0].dtype), None, None


class DenseLinear:
    """Keeps each unpacked matrix, eight times the codes' memory: for tests and small models."""

    def __init__(self) -> None:
        self._dense: dict[int, tuple[NF4Matrix, torch.Tensor]] = {}

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        if id(matrix) not in self._dense:  # the matrix is kept too, so its id stays its own
            self._dense[id(matrix)] = (matrix, dequantize(matrix))
        return by_tiles(x, self._dense[id(matrix)][1].to(x.dtype))


class ScratchLinear:
    """For training on the CPU: unpacks each matrix, in either direction, into the same memory.

    Kept are the blocks' maxima as floats (1/64 of the weights' number) and the room for the largest
    matrix. Products are of all rows at once. Not thread-safe.
    """

    def __init__(self, unpack: nf4.Unpack | None = None) -> None:
        """`unpack`: the kernel, if there is one."""
        self._unpack = unpack
        self._maxima: dict[int, tuple[NF4Matrix, torch.Tensor]] = {}
        self._scratch = torch.empty(0)

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        result: torch.Tensor = _Unpacked.apply(x, matrix, self._weight)  # type: ignore[no-untyped-call]
        return result

    def _weight(self, matrix: NF4Matrix) -> torch.Tensor:
        """[out, in], good until the next call."""
        if self._unpack is None:
            return nf4.dequantize(matrix)
        if id(matrix) not in self._maxima:  # the matrix is kept too, so its id stays its own
            self._maxima[id(matrix)] = (matrix, nf4.maxima(matrix))
        count = matrix.shape[0] * matrix.shape[1]
        if self._scratch.numel() < count:
            self._scratch = torch.empty(count)
        weight = self._scratch[:count]
        self._unpack(matrix, self._maxima[id(matrix)][1], weight)
        return weight.view(matrix.shape)


class FusedLinear:
    """bitsandbytes' fused 4-bit product, for CUDA.

    The maxima are kept as float32, since bitsandbytes' double quantisation has one offset a matrix
    and a stack has one for each module: 0.4 bits a weight more.
    """

    def __init__(self) -> None:
        self._states: dict[int, tuple[NF4Matrix, Any]] = {}

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        import bitsandbytes

        state = self._state(matrix, x.dtype)
        result: torch.Tensor = bitsandbytes.matmul_4bit(x, matrix.packed.view(-1, 1), state)
        return result

    def _state(self, matrix: NF4Matrix, dtype: torch.dtype) -> Any:
        from bitsandbytes.functional import QuantState

        if id(matrix) not in self._states:
            state = QuantState(
                absmax=absmax_float(matrix).reshape(-1),
                shape=torch.Size(matrix.shape),
                code=nf4_code(matrix.packed.device),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=dtype,
            )
            self._states[id(matrix)] = (matrix, state)
        return self._states[id(matrix)][1]
