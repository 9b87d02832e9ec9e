"""Products of activations with the base model's matrices on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_model.decoder.cuda.kernels import nf4
from loraplex_model.decoder.cuda.pack import DeviceMatrix


class Products:
    """Computes `x @ W.T + bias` for the matrices that it was made with.

    The launches of one instance share scratch memory, so they belong on one stream.
    """

    def __init__(
        self, matrices: Sequence[DeviceMatrix], dtype: torch.dtype, *, most_rows: int
    ) -> None:
        """`most_rows` is the largest number of rows of a product."""
        self._device = matrices[0].codes.device
        self._dtype = dtype
        launches = [
            (nf4.tilings(matrix.shape, rows, dtype, 132)[0], matrix.shape, rows)
            for matrix in matrices
            for rows in (*range(1, min(most_rows, 128)), most_rows)
        ]
        self._scratch = nf4.Scratch.for_launches(launches, self._device)

    def multiply(self, matrix: DeviceMatrix, x: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `x @ W.T + bias` to `out`: x [T, in] -> out [T, out], both of the compute dtype.

        Rows of x and out are contiguous. Can be captured in a CUDA graph.
        """
        if matrix.dense is not None:
            torch.mm(x, matrix.dense.T, out=out)
            if matrix.bias is not None:
                out += matrix.bias
            return
        tiling = nf4.tilings(matrix.shape, len(x), self._dtype, 132)[0]
        nf4.multiply(matrix, x, out, tiling, self._scratch)
