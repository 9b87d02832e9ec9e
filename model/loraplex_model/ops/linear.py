"""Products with NF4 matrices in torch: four implementations of `BaseLinear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from loraplex_model.base.weights import BLOCK, NF4Matrix
from loraplex_model.ops import nf4, products
from loraplex_model.ops.nf4 import absmax_float, dequantize, nf4_code
from loraplex_model.ops.quiet import quieten_bitsandbytes

TILE = 16
"""Number of rows of one CPU matrix product. Libraries choose their code path, and with it the order
of a sum, by the number of rows; a constant number makes a row's bits independent of other rows."""


class BaseLinear(Protocol):
    """Computes `x @ W.T` for a base matrix: x [T, in] -> [T, out] in the type of x.

    The result is differentiable in x.
    """

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor: ...


def by_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`; on the CPU without autograd in tiles of `TILE` rows, the last zero-padded."""
    rows = x.shape[0]
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x @ weight.T
    tiled = torch.nn.functional.pad(x, (0, 0, 0, -rows % TILE))
    out = x.new_empty(tiled.shape[0], weight.shape[0])
    for start in range(0, tiled.shape[0], TILE):
        torch.mm(tiled[start : start + TILE], weight.T, out=out[start : start + TILE])
    return out[:rows]


class DequantisedLinear:
    """Unpacks the matrix for every product, again in the backward pass, and keeps nothing."""

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        if not torch.is_grad_enabled():
            return by_tiles(x, dequantize(matrix).to(x.dtype))
        result: torch.Tensor = _Unpacked.apply(x, matrix, _dequantised)  # type: ignore[no-untyped-call]
        return result


def _dequantised(matrix: NF4Matrix, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(matrix).to(dtype)


class _Unpacked(torch.autograd.Function):
    """`x @ W.T` with a constant weight, so that x alone has a gradient: `g @ W`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        matrix: NF4Matrix,
        unpack: Callable[[NF4Matrix, torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        ctx.matrix, ctx.unpack = matrix, unpack
        return x @ unpack(matrix, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.unpack(ctx.matrix, grads[0].dtype), None, None


class _InKernels(torch.autograd.Function):
    """`_Unpacked` for bfloat16 on the CPU: the kernels unpack parts of the matrix as they go."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: NF4Matrix, maxima: torch.Tensor) -> torch.Tensor:
        ctx.matrix, ctx.maxima = matrix, maxima
        return products.product(matrix, maxima, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return products.product(ctx.matrix, ctx.maxima, grads[0], back=True), None, None


class DenseLinear:
    """Keeps each unpacked matrix in float32, for tests and small models: eight times the memory."""

    def __init__(self) -> None:
        self._dense: dict[NF4Matrix, torch.Tensor] = {}

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        if matrix not in self._dense:
            self._dense[matrix] = dequantize(matrix)
        return by_tiles(x, self._dense[matrix].to(x.dtype))


class ScratchLinear:
    """For training on the CPU: unpacks every matrix into the same scratch memory, in both passes.

    Keeps each block's absmax in float32 (1/64 of the weight count) and one scratch matrix as large
    as the largest weight, in bfloat16 for inputs of that type. Multiplies all rows at once. Not
    thread-safe.
    """

    def __init__(self, unpack: nf4.Unpack | None = None) -> None:
        """`unpack` is the kernel that unpacks; without one, `nf4.dequantize` does."""
        self._unpack = unpack
        self._maxima: dict[NF4Matrix, torch.Tensor] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        result: torch.Tensor
        if self.in_kernels(matrix, x):
            result = _InKernels.apply(x, matrix, self._maxima_of(matrix))  # type: ignore[no-untyped-call]
        else:
            result = _Unpacked.apply(x, matrix, self._weight)  # type: ignore[no-untyped-call]
        return result

    def in_kernels(self, matrix: NF4Matrix, x: torch.Tensor) -> bool:
        """Whether the kernels for bfloat16 products multiply x by the matrix."""
        return x.dtype == torch.bfloat16 and products.fits(matrix) and products.available()

    def back(self, matrix: NF4Matrix, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of x for that of the product, if `in_kernels` is true of both."""
        return products.product(matrix, self._maxima_of(matrix), gradient, back=True)

    def _maxima_of(self, matrix: NF4Matrix) -> torch.Tensor:
        if matrix not in self._maxima:
            self._maxima[matrix] = nf4.maxima(matrix)
        return self._maxima[matrix]

    def _weight(self, matrix: NF4Matrix, dtype: torch.dtype) -> torch.Tensor:
        """The weights [out, in], valid until the next call."""
        if self._unpack is None:
            return nf4.dequantize(matrix).to(dtype)
        count = matrix.shape[0] * matrix.shape[1]
        kept = dtype if dtype == torch.bfloat16 else torch.float32
        scratch = self._scratch.get(kept)
        if scratch is None or scratch.numel() < count:
            scratch = self._scratch[kept] = torch.empty(count, dtype=kept)
        weight = scratch[:count]
        self._unpack(matrix, self._maxima_of(matrix), weight)
        return weight.view(matrix.shape).to(dtype)


class FusedLinear:
    """bitsandbytes' fused 4-bit product, for CUDA.

    The maxima are kept in float32, which takes 0.4 bits per weight more: bitsandbytes' double
    quantisation has one offset per matrix, and a stack has one per module. Matrices whose rows do
    not hold whole blocks are unpacked for every product, since bitsandbytes assumes whole blocks.
    """

    def __init__(self) -> None:
        quieten_bitsandbytes()
        self._states: dict[NF4Matrix, Any] = {}
        self._unfit = DequantisedLinear()

    def __call__(self, matrix: NF4Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `BaseLinear`."""
        if matrix.shape[1] % BLOCK:
            return self._unfit(matrix, x)
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        if matrix not in self._states:
            self._states[matrix] = QuantState(
                absmax=absmax_float(matrix).reshape(-1),
                shape=torch.Size(matrix.shape),
                code=nf4_code(matrix.packed.device),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=x.dtype,
            )
        codes = matrix.packed.view(-1, 1)
        result: torch.Tensor = bitsandbytes.matmul_4bit(x, codes, self._states[matrix])
        return result
