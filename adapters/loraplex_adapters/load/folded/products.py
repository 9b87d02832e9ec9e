"""Kinds whose change is a product of small matrices: LoHa and LoKr."""

from __future__ import annotations

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors, fits


def loha(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors | torch.Tensor:
    """LoHa (arXiv 2108.06098): (w1_a w1_b) * (w2_a w2_b), element by element.

    The product of two sums of r products is one sum of r * r: column (i, j) of B is column i of
    w1_a times column j of w2_a, and row (i, j) of A is likewise of the rows of w1_b and w2_b.
    """
    a1, a2 = tensors["hada_w1_b"].float(), tensors["hada_w2_b"].float()  # [r, fan_in]
    b1, b2 = tensors["hada_w1_a"].float(), tensors["hada_w2_a"].float()  # [fan_out, r]
    if not fits(module, a1.shape[0] * a2.shape[0]):
        return (b1 @ a1) * (b2 @ a2)
    a = (a1[:, None] * a2).flatten(end_dim=1)
    return a, (b1[:, :, None] * b2[:, None]).flatten(start_dim=1)


def lokr(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """LoKr (arXiv 2309.14859): the Kronecker product of w1 and w2.

    Each is a matrix or the product of two; kron(b1 a1, b2 a2) = kron(b1, b2) kron(a1, a2). The rank
    of either half is at most its smaller side, so their product is at most the module's.
    """
    (b1, a1), (b2, a2) = _half(tensors, "lokr_w1"), _half(tensors, "lokr_w2")
    return torch.kron(a1, a2), torch.kron(b1, b2)


def _half(tensors: Tensors, role: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix of LoKr as a product of two, whose inner width is at most its smaller side."""
    if role in tensors:
        whole = tensors[role].float()
    else:
        b, a = tensors[f"{role}_a"].float(), tensors[f"{role}_b"].float()
        if a.shape[0] <= min(a.shape[1], b.shape[0]):
            return b, a
        whole = b @ a
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])
