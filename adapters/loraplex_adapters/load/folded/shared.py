"""Kinds whose modules share random matrices and train vectors: VeRA, PVeRA and RandLoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors


def vera(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """VeRA (arXiv 2310.11454): diag(b) B diag(d) A, cut to the widths of the module."""
    fold = module.fold
    assert fold is not None
    d, b = tensors["vera_lambda_d"].float(), tensors["vera_lambda_b"].float()
    a = tensors["vera_A"][:, : fold.fan_in].float() * d[:, None]
    return a, tensors["vera_B"][: fold.fan_out].float() * b[:, None]


def pvera(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """PVeRA: VeRA with the first halves of d and A, which give the means."""
    rank = tensors["pvera_B"].shape[1]
    means = {role.removeprefix("p"): tensor for role, tensor in tensors.items()}
    for role in ("vera_lambda_d", "vera_A"):
        means[role] = means[role][:rank]
    return vera(module, means, base)


def randlora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """RandLoRA (arXiv 2502.00987): a sum over bases of B_i diag(lambda_i) A diag(gamma_i).

    A belongs to the smaller side of the module. As in PEFT, A is flattened with the rank before the
    number of the basis, and B with the number before the rank, so that they meet in another order
    than in the paper.
    """
    fold = module.fold
    assert fold is not None
    factor, gamma = tensors["randlora_lambda"].float(), tensors["randlora_gamma"].float()
    small, large = min(fold.fan_in, fold.fan_out), max(fold.fan_in, fold.fan_out)
    a = tensors["randlora_A"][:, :, :small].float()  # [r, 1, small]
    b = tensors["randlora_B"][:large, : gamma.shape[0]].float()  # [large, bases, r]
    a = (factor[:, :, None] * a * gamma).flatten(end_dim=1)
    b = b.flatten(start_dim=1)
    return (a, b) if small == fold.fan_in else (b.T, a.T)


def regenerated(modules: Iterable[ModuleSpec]) -> Tensors:
    """VeRA's shared matrices if the file has their seed instead; empty if it has no seed.

    As in PEFT, A [r, inputs], with twice the rows for PVeRA, and then B [outputs, r] are uniform
    within +-sqrt(6 / columns), drawn by torch's CPU generator.
    """
    fold = next((m.fold for m in modules if m.fold is not None and "seed" in m.fold.settings), None)
    if fold is None:
        return {}
    names = ("r", "rows", "inputs", "outputs")
    rank, rows, inputs, outputs = (int(fold.settings[name]) for name in names)
    generator = torch.Generator("cpu").manual_seed(int(fold.settings["seed"]))
    found = {}
    for part, shape in (("A", (rows, inputs)), ("B", (outputs, rank))):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        found[f"{fold.arithmetic}_{part}"] = torch.empty(shape).uniform_(
            -bound, bound, generator=generator
        )
    return found
