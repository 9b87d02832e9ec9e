"""Merging on demand: dense copies of the matrices that an adapter changes, beside the NF4 ones.

    W' = diag(gain) W diag(in_gain) + B A,    bias' = gain * bias + the adapter's bias

The packed NF4 bytes are only read, so dropping the copies leaves the base as it was, bit for bit.
(Merging into NF4 and back does neither: it rounds a small delta away, and requantises the base.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraplex_model.adapters.delta import AdapterDelta, SiteDelta
from loraplex_model.adapters.table import DenseMatrix
from loraplex_model.base.config import FUSED, PROJECTIONS, DecoderConfig
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops import nf4


def is_mergeable(changes: AdapterDelta) -> bool:
    """Whether the adapter changes a matrix of the layers; others have nothing to merge."""
    return any(
        name in PROJECTIONS and (change.b is not None or change.gain is not None
                                 or change.in_gain is not None)
        for (_, name), change in changes.sites.items()
    )  # fmt: skip


def merged_nbytes(changes: AdapterDelta, config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes that `merge_layers` will return, known without any work; 0 if nothing is mergeable."""
    if not is_mergeable(changes):
        return 0
    shapes = config.projection_shapes()
    total = 0
    for layer in range(config.num_layers):
        for fused in _touched(changes, layer):
            out = sum(shapes[name][1] for name in FUSED[fused])
            total += out * shapes[FUSED[fused][0]][0] * dtype.itemsize
            total += 4 * out * _has_bias(changes, config, layer, fused)
    return total


def merge_layers(
    weights: BaseWeights, changes: AdapterDelta, dtype: torch.dtype
) -> Iterator[tuple[tuple[int, str], DenseMatrix]]:
    """Every fused matrix that the adapter touches, merged in float32 and rounded once to `dtype`,
    one at a time. Other matrices stay out: rows go on using the base's.
    """
    for index, layer in enumerate(weights.layers):
        for fused in _touched(changes, index):
            matrix, bias = fused_matrix(layer, fused)
            yield (index, fused), _merge(changes, index, fused, matrix, bias, dtype)


def fused_matrix(layer: LayerWeights, fused: str) -> tuple[NF4Matrix, torch.Tensor | None]:
    """A layer's matrix by name, and its bias."""
    biases = {"qkv": layer.qkv_bias, "o": layer.o_bias}
    matrices = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
    return matrices[fused], biases.get(fused)


def merged_module(weight: torch.Tensor, change: SiteDelta) -> torch.Tensor:
    """`diag(gain) W diag(in_gain) + B A` of a module's float32 weight [out, in], in new memory."""
    merged = weight.clone()
    if change.in_gain is not None:
        merged *= change.in_gain
    if change.gain is not None:
        merged *= change.gain[:, None]
    if change.a is not None and change.b is not None:
        merged.addmm_(change.b.float().T, change.a.float())
    return merged


def _merge(
    changes: AdapterDelta,
    layer: int,
    fused: str,
    matrix: NF4Matrix,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> DenseMatrix:
    dense = nf4.dequantize(matrix)
    total = torch.zeros(matrix.shape[0], device=dense.device) if bias is None else bias.float()
    total, biased, end = total.clone(), bias is not None, 0
    for name, rows in zip(FUSED[fused], matrix.rows, strict=True):
        start, end = end, end + rows
        change = changes.at((layer, name))
        if change is None:
            continue
        dense[start:end] = merged_module(dense[start:end], change)
        if change.gain is not None:
            total[start:end] *= change.gain
        if change.bias is not None:
            total[start:end] += change.bias
            biased = True
    return DenseMatrix(dense.to(dtype), total if biased else None)


def _touched(changes: AdapterDelta, layer: int) -> list[str]:
    """The fused matrices of a layer at which the adapter changes anything, a bias for instance:
    rows with dense matrices use nothing of the adapter's projections beside them."""
    return [
        fused
        for fused, names in FUSED.items()
        if any(changes.at((layer, name)) is not None for name in names)
    ]


def _has_bias(changes: AdapterDelta, config: DecoderConfig, layer: int, fused: str) -> bool:
    if (fused == "qkv" and config.qkv_bias) or (fused == "o" and config.o_bias):
        return True
    found = (changes.at((layer, name)) for name in FUSED[fused])
    return any(change is not None and change.bias is not None for change in found)
