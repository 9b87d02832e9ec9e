"""Quantising to NF4 with the compiled kernel, on all threads and at the speed of memory."""

from __future__ import annotations

import logging
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch

from loraplex_model.base.quantisation import BLOCK
from loraplex_model.ops import build, nf4

log = logging.getLogger(__name__)

WORTH_COMPILING = 500_000_000
"""Number of weights for which compiling the kernels takes less time than to quantise in torch."""

_CHUNK = 1 << 24  # weights of other types that are converted to float32 at once


def kernel(directory: Path | None, weights: int) -> nf4.QuantiseBlocks | None:
    """The kernel for a base model of that many weights; None if there is none.

    Kernels in `directory` (default: `build.default_directory`) are used if they are there, and are
    compiled for a large model only.
    """
    if weights < WORTH_COMPILING and not build.is_built(build.chosen_isa(), directory):
        return None
    try:
        library = build.load(directory=directory)
    except build.KernelsUnavailable as error:
        log.warning("no compiled kernels, so the conversion will take longer: %s", error)
        return None

    def quantise(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = flat.numel()
        packed = torch.empty(-(-count // 2), dtype=torch.uint8)
        maxima = torch.empty(-(-count // BLOCK))
        native = flat.dtype in (torch.float32, torch.bfloat16)
        for chunk in range(0, count, count if native else _CHUNK):
            part = flat if native else flat[chunk : chunk + _CHUNK].float()
            part = part.contiguous()
            library.loraplex_quantise_nf4(
                c_void_p(part.data_ptr()),
                int(part.dtype == torch.bfloat16),
                c_int64(part.numel()),
                c_void_p(packed.data_ptr() + chunk // 2),
                c_void_p(maxima.data_ptr() + 4 * (chunk // BLOCK)),
                torch.get_num_threads(),
            )
        return packed, maxima

    return quantise
