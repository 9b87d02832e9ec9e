"""Quantised rows of GGUF files to float32, on several threads and in little memory.

The `gguf` package computes the values. Its own loop keeps all of them twice, on one core.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_AT_ONCE = 1 << 18  # values that a thread dequantises at once


def dequantised(raw: NDArray[np.uint8], shape: tuple[int, ...], kind: Any) -> torch.Tensor:
    """The values of bytes `raw` of the ggml type `kind`, float32 of a `shape`.

    Memory is that of the values and of a few pieces. Raises NotImplementedError for a type that the
    package does not know, and ValueError for a shape that does not hold whole blocks of it.
    """
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    rows = raw.reshape(-1, quant_shape_to_byte_shape(shape, kind)[-1])
    values = torch.empty(shape)
    into = values.numpy().reshape(len(rows), -1)
    step = max(1, _AT_ONCE // into.shape[1])

    def piece(start: int) -> None:
        # as one long row, since the package would take rows by the dozen
        into[start : start + step].reshape(-1)[:] = dequantize(
            rows[start : start + step].reshape(1, -1), kind
        ).reshape(-1)

    piece(0)  # alone, since the package makes its tables at the first call
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(piece, range(step, len(rows), step)):
            pass
    return values
