"""NF4 codes to floats at the speed of memory, for training."""

from __future__ import annotations

import logging
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from loraplex_model.base.weights import NF4Matrix
from loraplex_model.ops import build, nf4

log = logging.getLogger(__name__)


def kernel() -> nf4.Unpack | None:
    """The compiled kernel; None, with a warning, where there is none to be had."""
    try:
        library = build.load()
    except build.KernelsUnavailable as error:
        log.warning("training without the compiled kernels, more slowly: %s", error)
        return None

    def unpack(matrix: NF4Matrix, maxima: torch.Tensor, into: torch.Tensor) -> None:
        assert into.is_contiguous()
        assert into.dtype == torch.float32
        fan_in = matrix.shape[1]
        code = block = 0
        for rows in matrix.rows:  # blocks begin anew with each module
            library.loraplex_unpack_nf4(
                c_void_p(matrix.packed.data_ptr() + code // 2),
                c_void_p(maxima.data_ptr() + 4 * block),
                c_int64(rows * fan_in),
                c_void_p(into.data_ptr() + 4 * code),
                torch.get_num_threads(),
            )
            code += rows * fan_in
            block += nf4.blocks_of(rows, fan_in)

    return unpack


def dequantize(matrix: NF4Matrix) -> torch.Tensor:
    """`nf4.dequantize`, bit for bit, by the kernel where there is one for where the matrix is."""
    unpack = None if matrix.packed.is_cuda else _kernel()
    if unpack is None:
        return nf4.dequantize(matrix)
    into = torch.empty(matrix.shape)
    unpack(matrix, nf4.maxima(matrix), into)
    return into


_kernel = cache(kernel)
