"""Merging on demand: dense copies of the matrices that an adapter changes, next to the NF4 ones.

    W' = diag(gain) W diag(in_gain) + B A,    bias' = gain * bias + the adapter's bias

The packed NF4 bytes are only read, so after dropping the copies the base is as before, bit for bit.
(Merging into NF4 would lose small changes by rounding, and undoing it would requantise the base.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.adapters.table import DenseMatrix
from loraplex_model.base.config import FUSED, DecoderConfig, Site, fused_place
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops import nf4


def is_mergeable(changes: AdapterDelta) -> bool:
    """Whether the adapter changes a matrix of the layers, so that there is something to merge."""
    return any(
        isinstance(change, ProjectionDelta) and changes_matrix(change)
        for change in changes.sites.values()
    )


def changes_matrix(change: ProjectionDelta) -> bool:
    """Whether the change concerns the projection's matrix, not only its bias."""
    return any(part is not None for part in (change.b, change.gain, change.in_gain))


def merged_nbytes(changes: AdapterDelta, config: DecoderConfig, dtype: torch.dtype) -> int:
    """Size in bytes of the result of `merge_layers`; 0 if there is nothing to merge."""
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
    """Merges the fused matrices that the adapter changes, one at a time.

    Each is computed in float32 and rounded once to `dtype`. Other matrices are left out, since rows
    go on using the base's.
    """
    for index, layer in enumerate(weights.layers):
        for fused in _touched(changes, index):
            matrix, bias = fused_matrix(layer, fused)
            yield (index, fused), _merge(changes, index, fused, matrix, bias, dtype)


def fused_matrix(layer: LayerWeights, fused: str) -> tuple[NF4Matrix, torch.Tensor | None]:
    """A layer's fused matrix by its name in `FUSED`, and its bias or None."""
    biases = {"qkv": layer.qkv_bias, "o": layer.o_bias}
    matrices = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
    return matrices[fused], biases.get(fused)


def own_matrix(base: BaseWeights, site: Site) -> NF4Matrix:
    """Returns a projection's NF4 weights as views of the base's."""
    fused, index = fused_place(site[1])
    return nf4.split(fused_matrix(base.layers[site[0]], fused)[0])[index]


def own_bias(base: BaseWeights, site: Site) -> torch.Tensor | None:
    """Returns a projection's bias [out] in the base's dtype, or None if it has none."""
    fused, index = fused_place(site[1])
    matrix, bias = fused_matrix(base.layers[site[0]], fused)
    return None if bias is None else torch.split(bias, list(matrix.rows))[index]


def merged_module(weight: torch.Tensor, change: ProjectionDelta) -> torch.Tensor:
    """`diag(gain) W diag(in_gain) + B A` for a float32 weight W [out, in], in new memory."""
    merged = weight.clone()
    if change.in_gain is not None:
        merged *= change.in_gain
    if change.gain is not None:
        merged *= change.gain[:, None]
    if change.factors is not None:
        a, b = change.factors
        merged.addmm_(b.float().T, a.float())
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
        change = changes.at((layer, name), ProjectionDelta)
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
    """Names of a layer's fused matrices at which the adapter changes anything, even a bias alone.

    Rows with a dense matrix use no other part of the adapter at these projections.
    """
    return [
        fused
        for fused, names in FUSED.items()
        if any((layer, name) in changes.sites for name in names)
    ]


def _has_bias(changes: AdapterDelta, config: DecoderConfig, layer: int, fused: str) -> bool:
    if not config.biased.isdisjoint(FUSED[fused]):
        return True
    found = (changes.at((layer, name), ProjectionDelta) for name in FUSED[fused])
    return any(change is not None and change.bias is not None for change in found)
