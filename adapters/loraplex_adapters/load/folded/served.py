"""Kinds whose change depends on the base's weight W, as it is served: HRA, DEFT and PEANuT.

PEFT computes them from the weight in the model that it adapts, which must not be quantised. With
the dequantised NF4 weights in that model, the results are the same. This holds for KaSA
(`variants`) too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from loraplex_model.adapters.merge import own_weight
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.kinds.folded.peanut import ACTIVATIONS
from loraplex_adapters.format.modules import module_path
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors

_DEPENDENT = 1e-5
"""Share of a vector's length that must be left when it is made orthogonal to those before it. Of
float32 numbers, less than this is mostly rounding."""

_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
}
"""The functions of `ACTIVATIONS`, by name."""


def served_weight(module: ModuleSpec, base: BaseWeights) -> torch.Tensor:
    """The dequantised weight of a linear module, float32 [fan_out, fan_in]."""
    if module.module == "lm_head":
        return base.lm_head.float()
    return own_weight(base, (module.layer, module.module))


def hra(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """HRA (arXiv 2405.17484): W H = W - (W V) U^T, with H = H_1 ... H_r = 1 - V U^T.

    H_i = 1 - 2 u_i u_i^T, and column i of V is 2 H_1 ... H_(i-1) u_i. With orthogonal vectors V is
    2 U. Raises Refusal(ADAPTER_INVALID) for vectors without a direction.
    """
    assert module.fold is not None
    u = tensors["hra_u"].double()  # [fan_in, r]
    if module.fold.settings["orthogonal"]:
        u = _orthogonal(u, module, base)
        v = 2 * u
    else:
        u = u / _lengths(u, module, base)
        v = torch.empty_like(u)
        for i in range(u.shape[1]):
            v[:, i] = 2 * (u[:, i] - v[:, :i] @ (u[:, :i].T @ u[:, i]))
    weight = served_weight(module, base)
    return u.T.float().contiguous(), -(weight @ v.float().to(weight.device)).cpu()


def _lengths(u: torch.Tensor, module: ModuleSpec, base: BaseWeights) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(u, dim=0)
    if not bool((lengths > 0).all()):
        raise _no_direction(module, base, "is zero")
    return lengths


def _orthogonal(u: torch.Tensor, module: ModuleSpec, base: BaseWeights) -> torch.Tensor:
    """Unit vectors by Gram and Schmidt's method, each from the columns up to its own."""
    lengths = _lengths(u, module, base)
    found = torch.empty_like(u)
    for i in range(u.shape[1]):
        column = u[:, i].clone()
        for j in range(i):
            column -= (found[:, j] @ column) * found[:, j]
        left = column.norm()
        if left <= _DEPENDENT * lengths[i]:
            raise _no_direction(
                module, base, "depends on those before it, so apply_GS leaves rounding"
            )
        found[:, i] = column / left
    return found


def _no_direction(module: ModuleSpec, base: BaseWeights, problem: str) -> Refusal:
    path = module_path(base.config.architecture, module.layer, module.module)
    return Refusal(Reason.ADAPTER_INVALID, f"a vector of {path}.hra_u {problem}", path)


def deft(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """DEFT: B = Q [fan_out, r] and A = s R - P W, with P = Q^T, or relu(Q)^T and Q as in the file.

    Without R (PaRa), A = -P W.
    """
    assert module.fold is not None
    q = tensors["deft_P"].float()
    if module.fold.settings["orthogonal"]:
        q, _ = torch.linalg.qr(q)
        projection = q.T
    else:
        projection = torch.relu(q).T
    weight = served_weight(module, base)
    a = -(projection.to(weight.device) @ weight).cpu()
    if "deft_R" in tensors:
        a += module.fold.settings["scale"] * tensors["deft_R"].float()
    return a, q


def peanut(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors:
    """PEANuT: A = f(W^T A'^T)^T, with PEFT's A' and f; B as in the file."""
    assert module.fold is not None
    weight = served_weight(module, base)
    matrices = {role: tensor.float().to(weight.device) for role, tensor in tensors.items()}
    activation = _FUNCTIONS[ACTIVATIONS[int(module.fold.settings["activation"])]]
    state = activation(weight.T @ matrices["peanut_A.weight"].T)  # [fan_in, r]
    residuals = []
    depth = int(module.fold.settings["depth"])
    for n in range(depth):
        residuals.append(state)
        state = activation(state @ matrices[f"peanut_encoders.{n}.weight"].T)
    for n in range(depth):
        state = activation(state @ matrices[f"peanut_decoders.{n}.weight"].T)
        state = state + residuals[depth - 1 - n]
    return state.T.cpu().contiguous(), tensors["peanut_B.weight"].float()
