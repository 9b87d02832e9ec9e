"""Kinds that divide a matrix into blocks: MiSS and GraLoRA."""

from __future__ import annotations

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Factors, Tensors, fits


def miss(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors | torch.Tensor:
    """MiSS (arXiv 2409.15371): input i is added to sum i % r, and the block maps the r sums.

    The block is [r, fan_out], or [r, m] if output j is column j % m of it.
    """
    block, fold = tensors["miss_block"].float(), module.fold
    assert fold is not None
    sums = torch.arange(fold.fan_in) % block.shape[0]
    columns = torch.arange(fold.fan_out) % block.shape[1]
    if not fits(module, min(block.shape)):
        return block[sums][:, columns].T
    if block.shape[0] <= block.shape[1]:
        return _one_hot(sums, block.shape[0]).T, block[:, columns].T
    return block[sums].T, _one_hot(columns, block.shape[1])


def gralora(module: ModuleSpec, tensors: Tensors, base: BaseWeights) -> Factors | torch.Tensor:
    """GraLoRA (arXiv 2505.20355): the change is k * k blocks, each of its own rank s = r / k.

    Block (j, n) of outputs and inputs is the product of column block j of A's block n and row
    block n of B's block j. With k * k * s columns (n, j, t), A is zero outside of the inputs of n,
    and B outside of the outputs of j. The hybrid part is plain LoRA of the same scale.
    """
    a, b = tensors["gralora_A"].float(), tensors["gralora_B"].float()
    k, width, rank = a.shape
    a = a.view(k, width, k, rank // k)  # [n, input, j, t]
    b = b.view(k, k, rank // k, b.shape[2])  # [j, n, t, output]
    has_hybrid = "gralora_A_general" in tensors
    hybrid = tensors["gralora_A_general"].shape[0] if has_hybrid else 0
    if not fits(module, k * rank + hybrid):
        whole = torch.einsum("nijt,jnto->joni", a, b).reshape(b.shape[0] * b.shape[3], k * width)
        if has_hybrid:
            whole += tensors["gralora_B_general"].float() @ tensors["gralora_A_general"].float()
        return whole
    one = torch.eye(k)
    wide_a = torch.einsum("nijt,nm->njtmi", a, one).reshape(k * rank, -1)
    wide_b = torch.einsum("jnto,jm->monjt", b, one).reshape(-1, k * rank)
    if has_hybrid:
        wide_a = torch.cat([wide_a, tensors["gralora_A_general"].float()])
        wide_b = torch.cat([wide_b, tensors["gralora_B_general"].float()], dim=1)
    return wide_a, wide_b


def _one_hot(indices: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of the identity, float32 [indices, width]."""
    return torch.eye(width)[indices]
