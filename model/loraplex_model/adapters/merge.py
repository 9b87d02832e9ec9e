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
from loraplex_model.base.config import DecoderConfig, Site
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix
from loraplex_model.ops import nf4


def is_mergeable(changes: AdapterDelta) -> bool:
    """Whether the adapter changes a matrix of the layers, so that there is something to merge."""
    return any(
        isinstance(change, ProjectionDelta) and changes_matrix(change)
        for change in changes.sites.values()
    )


def _changes_experts(changes: AdapterDelta, config: DecoderConfig) -> bool:
    """Whether the adapter has factors for experts, of which there would be too many copies."""
    return any(name in config.expert_projections for _, name in changes.sites)


def changes_matrix(change: ProjectionDelta) -> bool:
    """Whether the change concerns the projection's matrix, not only its bias."""
    return any(part is not None for part in (change.b, change.gain, change.in_gain))


def merged_nbytes(changes: AdapterDelta, config: DecoderConfig, dtype: torch.dtype) -> int:
    """Size in bytes of the result of `merge_layers`; 0 if there is nothing to merge."""
    if not is_mergeable(changes) or _changes_experts(changes, config):
        return 0
    shapes = config.projection_shapes()
    total = 0
    for layer in range(config.num_layers):
        for fused in _touched(changes, config, layer):
            parts = config.fused[fused]
            out = sum(shapes[name][1] for name in parts)
            total += out * shapes[parts[0]][0] * dtype.itemsize
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
        for fused in _touched(changes, weights.config, index):
            yield (index, fused), _merge(weights.config, changes, index, fused, layer, dtype)


def fused_matrix(layer: LayerWeights, fused: str) -> tuple[NF4Matrix, torch.Tensor | None]:
    """A layer's fused matrix by its name in `FUSED`, and its bias or None."""
    matrices = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}
    return matrices[fused], layer.biases[fused]


def own_matrix(base: BaseWeights, site: Site) -> NF4Matrix:
    """Returns the NF4 weights of a module of the checkpoint as views of the base's.

    The name at the site is one of `DecoderConfig.module_shapes`: parts of a joined module have no
    NF4 weights of their own, since they are quantised together.
    """
    fused, _, _ = base.config.place(site[1])
    matrix = fused_matrix(base.layers[site[0]], fused)[0]
    return nf4.split(matrix)[base.config.modules_of(fused).index(site[1])]


def own_weight(base: BaseWeights, site: Site) -> torch.Tensor:
    """Returns the dequantised weights, float32 [out, in], of a projection or a joined module."""
    fused, start, rows = base.config.place(site[1])
    if site[1] in base.config.modules_of(fused):
        return nf4.dequantize(own_matrix(base, site))
    whole = nf4.dequantize(fused_matrix(base.layers[site[0]], fused)[0])
    return whole[start : start + rows].clone()


def own_bias(base: BaseWeights, site: Site) -> torch.Tensor | None:
    """Returns the bias [out], in the base's dtype, of a projection or a joined module, or None."""
    fused, start, rows = base.config.place(site[1])
    bias = base.layers[site[0]].biases[fused]
    return None if bias is None else bias[start : start + rows]


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
    config: DecoderConfig,
    changes: AdapterDelta,
    layer: int,
    fused: str,
    weights: LayerWeights,
    dtype: torch.dtype,
) -> DenseMatrix:
    matrix, bias = fused_matrix(weights, fused)
    dense = nf4.dequantize(matrix)
    total = torch.zeros(matrix.shape[0], device=dense.device) if bias is None else bias.float()
    total, biased = total.clone(), bias is not None
    for name in config.fused[fused]:
        _, start, rows = config.place(name)
        end = start + rows
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


def _touched(changes: AdapterDelta, config: DecoderConfig, layer: int) -> list[str]:
    """Names of a layer's fused matrices at which the adapter changes anything, even a bias alone.

    Rows with a dense matrix use no other part of the adapter at these projections.
    """
    return [
        fused
        for fused, names in config.fused.items()
        if any((layer, name) in changes.sites for name in names)
    ]


def _has_bias(changes: AdapterDelta, config: DecoderConfig, layer: int, fused: str) -> bool:
    names = config.fused[fused]
    if not config.biased.isdisjoint(names):
        return True
    found = (changes.at((layer, name), ProjectionDelta) for name in names)
    return any(change is not None and change.bias is not None for change in found)
