"""The contract of an arithmetic that turns a module's tensors into A and B."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec

Tensors = Mapping[str, torch.Tensor]
"""A module's tensors by role, in the shapes and types of the file."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [columns, fan_in] and B [fan_out, columns], float32, before the module's scale."""

Arithmetic = Callable[[ModuleSpec, Tensors, BaseWeights], Factors]
"""Computes A and B of one module. `module.fold` has the widths and settings; the base is there for
kinds that read its served weights."""
