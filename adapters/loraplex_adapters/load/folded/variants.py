"""Variants of LoRA: BD-LoRA, QA-LoRA and KaSA."""

from __future__ import annotations

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors
from loraplex_adapters.load.folded.served import served_weight

_COLUMNS = 4096
"""Columns of a weight that are in memory as float64 at once."""


def bdlora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """BD-LoRA: the blocks of A or B, which the file has one below the other, on a diagonal."""
    assert module.fold is not None
    counts = (int(module.fold.settings[name]) for name in ("blocks_a", "blocks_b"))
    parts = zip((tensors["a"].float(), tensors["b"].float()), counts, strict=True)
    a, b = (_on_diagonal(stacked, count) for stacked, count in parts)
    return a, b


def _on_diagonal(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """`count` blocks [rows, columns], one below the other, as a block-diagonal matrix."""
    rows, columns = stacked.shape[0] // count, stacked.shape[1]
    found = torch.zeros(count, rows, count, columns)
    blocks = torch.arange(count)
    found[blocks, :, blocks] = stacked.view(count, rows, columns)
    return found.view(count * rows, count * columns)


def qalora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """QA-LoRA (arXiv 2309.14717): a column of A for every input of its group, times a factor."""
    assert module.fold is not None
    size, factor = int(module.fold.settings["size"]), module.fold.settings["factor"]
    return tensors["a"].float().repeat_interleave(size, dim=1) * factor, tensors["b"].float()


def kasa(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """KaSA (arXiv 2412.06071): s B diag(d) A minus the r weakest directions of the served weight.

    With their left singular vectors U, these directions are U U^T W, and likewise W V V^T. The
    product does not depend on the signs of the vectors, nor on their order.
    """
    a, b = tensors["a"].float(), tensors["b"].float()
    weight = served_weight(module, base)
    fan_out, fan_in = weight.shape
    if fan_out <= fan_in:
        left = _weakest(weight, a.shape[0])
        removed_b, removed_a = left, left.T @ weight
    else:
        right = _weakest(weight.T, a.shape[0])
        removed_b, removed_a = weight @ right, right.T
    # The scale multiplies these columns as well, so each factor is divided by its root.
    root = abs(module.scale) ** 0.5
    sign = -1.0 if module.scale > 0 else 1.0
    a = torch.cat([a * tensors["lora_diag"].float()[:, None], removed_a.cpu() / root])
    return a, torch.cat([b, removed_b.cpu() * (sign / root)], dim=1)


def _weakest(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The left singular vectors [k, count] of the smallest singular values of a weight [k, m].

    They are the eigenvectors of W W^T, in float64, whose rounding is far below that of a singular
    value decomposition in float32, which PEFT makes.
    """
    gram = torch.zeros(weight.shape[0], weight.shape[0], dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[1], _COLUMNS):
        columns = weight[:, start : start + _COLUMNS].double()
        gram.addmm_(columns, columns.T)
    vectors: torch.Tensor = torch.linalg.eigh(gram)[1]
    return vectors[:, :count].float()
