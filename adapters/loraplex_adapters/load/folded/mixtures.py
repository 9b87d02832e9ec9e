"""Kinds whose factors are mixtures with constant weights: Poly."""

from __future__ import annotations

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors

_LEAST_SUM = 1e-12
"""What PEFT adds to the sum of the weights."""


def poly(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """Poly (arXiv 2202.13914): each split's factors, weighted by the task's normalised sigmoids."""
    a = tensors["poly_lora_A"].float()  # [splits, skills, fan_in / splits, r]
    b = tensors["poly_lora_B"].float()  # [splits, skills, r, fan_out / splits]
    weights = tensors["poly_router.module_logits"].float().view(a.shape[:2]).sigmoid()
    weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
    mixed_a = torch.einsum("qs,qsdr->qdr", weights, a).flatten(end_dim=1)  # [fan_in, r]
    mixed_b = torch.einsum("qs,qsrd->qdr", weights, b).flatten(end_dim=1)  # [fan_out, r]
    return mixed_a.T.contiguous(), mixed_b
