"""Kinds whose change is a product of small matrices: LoHa."""

from __future__ import annotations

from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors


def loha(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """LoHa (arXiv 2108.06098): (w1_a w1_b) * (w2_a w2_b), element by element.

    The product of two sums of r products is one sum of r * r: column (i, j) of B is column i of
    w1_a times column j of w2_a, and row (i, j) of A is likewise of the rows of w1_b and w2_b.
    """
    a1, a2 = tensors["hada_w1_b"].float(), tensors["hada_w2_b"].float()  # [r, fan_in]
    b1, b2 = tensors["hada_w1_a"].float(), tensors["hada_w2_a"].float()  # [fan_out, r]
    a = (a1[:, None] * a2).flatten(end_dim=1)
    return a, (b1[:, :, None] * b2[:, None]).flatten(start_dim=1)
