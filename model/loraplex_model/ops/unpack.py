"""Dequantising NF4 with the compiled kernel, at the speed of memory; used in training."""

from __future__ import annotations

import logging
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from loraplex_model.base.weights import NF4Matrix
from loraplex_model.ops import build, nf4

log = logging.getLogger(__name__)


def kernel() -> nf4.Unpack | None:
    """The compiled kernel; None, with a warning, if it is unavailable."""
    try:
        library = build.load()
    except build.KernelsUnavailable as error:
        log.warning("no compiled kernels, so training will be slower: %s", error)
        return None

    def unpack(matrix: NF4Matrix, maxima: torch.Tensor, into: torch.Tensor) -> None:
        assert into.is_contiguous()
        assert into.dtype in (torch.float32, torch.bfloat16)
        count = matrix.shape[0] * matrix.shape[1]
        assert count <= min(into.numel(), 2 * matrix.packed.numel())
        fan_in = matrix.shape[1]
        code = block = 0
        for rows in matrix.rows:  # each module starts a new block
            library.loraplex_unpack_nf4(
                c_void_p(matrix.packed.data_ptr() + code // 2),
                c_void_p(maxima.data_ptr() + 4 * block),
                c_int64(rows * fan_in),
                c_void_p(into.data_ptr() + into.itemsize * code),
                int(into.dtype == torch.bfloat16),
                torch.get_num_threads(),
            )
            code += rows * fan_in
            block += nf4.blocks_of(rows, fan_in)

    return unpack


def dequantize(matrix: NF4Matrix) -> torch.Tensor:
    """`nf4.dequantize`, bit for bit, by the kernel if the matrix is on the CPU and there is one."""
    unpack = None if matrix.packed.is_cuda else _kernel()
    if unpack is None:
        return nf4.dequantize(matrix)
    into = torch.empty(matrix.shape)
    unpack(matrix, nf4.maxima(matrix), into)
    return into


_kernel = cache(kernel)
