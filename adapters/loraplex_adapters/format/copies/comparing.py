"""Compares tensors of a file with the base's own weights, and with each other, in small pieces.

Embeddings, head and norms are stored as the checkpoint has them. A copy of them equals the base if
it holds the base's numbers, rounded to the type in which its author loaded the base and to the
file's type, in this order. Projections are stored in NF4 only. A copy equals them if quantising it
gives the stored codes and maxima, up to the rounding of bfloat16: nothing that is served could
differ then, whether the author had the matrix before or after its quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from loraplex_model.base.config import Site
from loraplex_model.base.dtypes import ITEM_SIZES, SAFETENSORS
from loraplex_model.base.quantisation import BLOCK, CODE
from loraplex_model.checkpoints.values import BaseValues, Blocks, Floats, floats, rounded
from numpy.typing import NDArray

from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.values import PIECE

Read = Callable[[int, int], bytes | memoryview]
"""Reads a number of bytes of the weights file from an offset: `read(offset, length)`."""

_LOADED = ("F32", "F16", "BF16")
"""Types in which an adapter's author may have loaded the base."""

_TOLERANCE = 2.0**-8
"""Largest relative error of a number and of a maximum that are rounded to bfloat16."""


def changed_rows(
    tensor: TensorLocation, read: Read, base: BaseValues, site: Site
) -> tuple[int, ...]:
    """Numbers of the rows of a copy [rows, width] that differ from the base's; a norm is a row.

    There are none if all rows equal the base's after rounding. If one does not, rows that were
    rounded count too, because what PEFT computes with the copy depends on them.
    """
    width = tensor.shape[-1]
    found: list[int] = []
    is_base = True
    for first, own in _rows(tensor, read, width):
        theirs = base.dense(site, first * width, own.size).reshape(own.shape)
        found += (first + np.flatnonzero((theirs != own).any(axis=1))).tolist()
        alike = np.zeros(len(own), bool)
        for kind in _LOADED:
            alike |= (rounded(rounded(theirs, kind), tensor.dtype) == own).all(axis=1)
        is_base = is_base and bool(alike.all())
    return () if is_base else tuple(found)


def equals_blocks(tensor: TensorLocation, read: Read, base: BaseValues, site: Site) -> bool:
    """Whether a copy [out, in] of a projection is quantised to what the base stores."""
    total = tensor.shape[0] * tensor.shape[1]
    start = 0
    for _, piece in _rows(tensor, read, BLOCK, total):
        own = piece.reshape(-1)
        if not _quantised_alike(own, base.blocks(site, start, own.size)):
            return False
        start += own.size
    return True


def equal(one: TensorLocation, other: TensorLocation, read: Read) -> bool:
    """Whether two tensors have the same values, in the type of either."""
    if one.shape != other.shape:
        return False
    total = int(np.prod(one.shape))
    pairs = zip(_rows(one, read, 1, total), _rows(other, read, 1, total), strict=True)
    return all(
        np.array_equal(rounded(a, other.dtype), b) or np.array_equal(a, rounded(b, one.dtype))
        for (_, a), (_, b) in pairs
    )


def _rows(
    tensor: TensorLocation, read: Read, width: int, total: int = 0
) -> Iterator[tuple[int, Floats]]:
    """Pieces of a tensor of whole rows of `width`, with their first row's number.

    With `total`, the number of elements, the last row may be short; such a piece is flat.
    """
    item = ITEM_SIZES[SAFETENSORS[tensor.dtype]]
    # All pieces of one call have as many elements, whatever their type.
    step = max(1, PIECE // (4 * width)) * width
    elements = (tensor.end - tensor.start) // item
    for first in range(0, elements, step):
        count = min(step, elements - first)
        values = floats(read(tensor.start + first * item, count * item), tensor.dtype)
        yield first // width, values if total else values.reshape(-1, width)


def _quantised_alike(own: Floats, theirs: Blocks) -> bool:
    short = -own.size % BLOCK
    values = np.pad(own, (0, short)).reshape(-1, BLOCK)
    codes = np.pad(theirs.codes, (0, short), constant_values=_ZERO).reshape(-1, BLOCK)
    maxima = np.abs(values).max(axis=1)
    if not _maxima_alike(maxima, theirs):
        return False
    scaled = values / np.where(maxima, maxima, 1)[:, None]
    low, high = _cells()
    return bool(((scaled >= low[codes]) & (scaled <= high[codes])).all())


_ZERO = CODE.index(0.0)


@cache
def _cells() -> tuple[Floats, Floats]:
    """The least and the largest number that each code stands for, with the tolerance."""
    code = np.array(CODE, np.float32)
    middles = (code[1:] + code[:-1]) / 2
    low = np.concatenate(([-2], middles - _TOLERANCE)).astype(np.float32)
    high = np.concatenate((middles + _TOLERANCE, [2])).astype(np.float32)
    return low, high


def _maxima_alike(maxima: Floats, theirs: Blocks) -> bool:
    allowed = _TOLERANCE * maxima
    if theirs.scales is None:
        return bool((np.abs(maxima - theirs.maxima) <= allowed).all())
    # The byte of a maximum must be the nearest one to it.
    scales = np.where(theirs.scales, theirs.scales, 1)
    places = (maxima - np.float32(theirs.offset)) / scales
    allowed = allowed / scales + np.float32(1e-6)
    low, high = _nested_cells()
    return bool(
        ((places >= low[theirs.maxima] - allowed) & (places <= high[theirs.maxima] + allowed)).all()
    )


@cache
def _nested_cells() -> tuple[Floats, Floats]:
    """The least and the largest number that each byte of a quantised maximum stands for.

    The 256 values are those of `loraplex_model.ops.nf4.dynamic_map`, which needs torch.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        steps: NDArray[np.float64] = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*steps, *-steps]
    code = np.array(sorted(values), np.float32)
    middles = (code[1:] + code[:-1]) / 2
    far = np.float32(np.inf)
    return (
        np.concatenate(([-far], middles)).astype(np.float32),
        np.concatenate((middles, [far])).astype(np.float32),
    )
