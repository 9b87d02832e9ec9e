"""The contract of an arithmetic that turns a module's tensors into A and B."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec

Tensors = Mapping[str, torch.Tensor]
"""A module's tensors by role, in the shapes and types of the file."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [rank, fan_in] and B [fan_out, rank], float32, before the module's scale."""

Arithmetic = Callable[[ModuleSpec, Tensors, BaseWeights], Factors | torch.Tensor]
"""Computes A and B of one module, or the whole change [fan_out, fan_in] if its parts' rank exceeds
the smaller width. `module.fold` has the widths and settings; the base is there for kinds that read
its served weights. The largest temporary is a few times the change or the module's tensors."""


def fits(module: ModuleSpec, columns: int) -> bool:
    """Whether A and B of that many columns are not larger than the whole change needs."""
    assert module.fold is not None
    return columns <= min(module.fold.fan_in, module.fold.fan_out)
