"""Kinds whose factors are scaled by lengths or made of pieces: DeLoRA and VB-LoRA."""

from __future__ import annotations

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors

_SHORTEST = 1e-4
"""PEFT's lower bound of the lengths that DeLoRA divides by."""


def delora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """DeLoRA (arXiv 2503.18225): A diag(w), and b_i times lambda / (r |a_i| |b_i|)."""
    a, b = tensors["delora_A"].float(), tensors["delora_B"].float()
    lengths = a.norm(dim=1).clamp(min=_SHORTEST) * b.norm(dim=0).clamp(min=_SHORTEST)
    strength = tensors["delora_lambda"].float() / a.shape[0] / lengths
    return a * tensors["delora_w_norm"].float(), b * strength


def vblora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """VB-LoRA (arXiv 2405.15179): A from logits [r, pieces, n], B from logits [pieces, r, n]."""
    assert module.fold is not None
    bank = tensors["base_model.vblora_vector_bank"].float()
    topk = int(module.fold.settings["topk"])
    a = _mixed(tensors["vblora_logits_A"].float(), bank, topk)  # [r, pieces, length]
    b = _mixed(tensors["vblora_logits_B"].float(), bank, topk)  # [pieces, r, length]
    rank = a.shape[0]
    return a.reshape(rank, -1), b.transpose(1, 2).reshape(-1, rank)


def _mixed(logits: torch.Tensor, bank: torch.Tensor, topk: int) -> torch.Tensor:
    """Means of the bank's vectors, weighted by the softmax of the largest logits."""
    best, places = logits.topk(topk, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, places, best.softmax(-1))
    return weights @ bank
