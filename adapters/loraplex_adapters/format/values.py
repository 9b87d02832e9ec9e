"""One pass over the weights: computes their digest and finds non-finite and too large values."""

from __future__ import annotations

import numpy as np
from loraplex_model.base.refusal import Problem, Reason
from numpy.typing import NDArray

from loraplex_adapters.format.digest import AdapterDigest
from loraplex_adapters.format.files import RegularFile
from loraplex_adapters.format.header import Header
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

PIECE = 4 << 20
"""Bytes that are in memory at once; a multiple of every element size."""


def scan(
    file: RegularFile, header: Header, digest: AdapterDigest, max_abs_value: float
) -> list[Problem]:
    """Adds the whole file to `digest` and reports tensors with elements beyond `max_abs_value`.

    The file is read in pieces instead of mapped, because truncating a mapped file kills the
    process. Raises Refusal if it cannot be read.
    """
    findings = []
    digest.update(file.read(0, header.data_start))
    buffer = memoryview(bytearray(min(PIECE, file.size)))
    for tensor in header.tensors:
        sound = True
        for start in range(tensor.start, tensor.end, PIECE):
            piece = buffer[: min(PIECE, tensor.end - start)]
            file.read_into(piece, start)
            digest.update(piece)
            sound = sound and _within(piece, tensor, max_abs_value)
        if not sound:
            message = f"{shown(tensor.name)} contains NaN, infinity or more than {max_abs_value:g}"
            findings.append(Problem(shown(tensor.name), message, Reason.ADAPTER_INVALID))
    return findings


def _within(piece: memoryview, tensor: TensorLocation, bound: float) -> bool:
    """Whether every |element| <= bound, by comparing bit patterns.

    Without the sign bit, the pattern of an IEEE number grows with its value, and infinity and NaN
    are the largest. So one integer maximum suffices for all formats, also for bfloat16, which numpy
    lacks.
    """
    bits: NDArray[np.uint32] | NDArray[np.uint16]
    if tensor.dtype == "F32":
        bits = np.frombuffer(piece, np.uint32) & np.uint32(0x7FFFFFFF)
    else:
        bits = np.frombuffer(piece, np.uint16) & np.uint16(0x7FFF)
    return int(bits.max()) <= _bound_bits(tensor.dtype, bound)


def _bound_bits(dtype: str, bound: float) -> int:
    """Bit pattern of the largest finite number of `dtype` that is not above `bound`."""
    if dtype == "F16":
        half = np.float16(min(bound, 65504.0))
        return int(half.view(np.uint16)) - int(float(half) > bound)
    single = np.float32(min(bound, float(np.finfo(np.float32).max)))
    pattern = int(single.view(np.uint32)) - int(float(single) > bound)
    return pattern if dtype == "F32" else min(pattern >> 16, 0x7F7F)
