"""bitsandbytes' 4-bit product on the kernels' matrices."""

from __future__ import annotations

from typing import Any

import torch

from loraplex_model.base.weights import BLOCK
from loraplex_model.decoder.cuda.pack import DeviceMatrix, codes_in_rows, maxima_in_rows
from loraplex_model.ops.quiet import quieten_bitsandbytes


class FourBit:
    """Computes products by bitsandbytes, from its own copy of codes and float32 maxima.

    bitsandbytes has one offset of maxima for a matrix, and a stack has one for each module, so the
    maxima are float32.
    """

    def __init__(self) -> None:
        self._states: dict[DeviceMatrix, tuple[torch.Tensor, Any]] = {}

    def prepare(self, matrix: DeviceMatrix, dtype: torch.dtype) -> None:
        """Makes the copy, unless it is there. Raises ImportError without bitsandbytes."""
        if matrix in self._states:
            return
        quieten_bitsandbytes()
        from bitsandbytes.functional import QuantState

        state = QuantState(
            absmax=maxima_in_rows(matrix).reshape(-1),
            shape=torch.Size(matrix.shape),
            code=matrix.values,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        self._states[matrix] = (codes_in_rows(matrix).view(-1, 1), state)

    def forget(self, matrix: DeviceMatrix) -> None:
        """Releases the copy."""
        self._states.pop(matrix, None)

    def __call__(self, matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `x @ W.T + bias` to `out`. `prepare` has been called."""
        import bitsandbytes

        codes, state = self._states[matrix]
        bitsandbytes.matmul_4bit(x, codes, state, out=out, bias=matrix.bias)
