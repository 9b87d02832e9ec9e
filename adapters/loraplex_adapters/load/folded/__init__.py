"""Kinds that fold into A and B: their arithmetic, by name, done once at load.

`factors` is what callers use, with what `regenerated` returns among the tensors. `base` has the
contract of a function of `ARITHMETIC`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Arithmetic, Tensors
from loraplex_adapters.load.folded.blocks import gralora, miss
from loraplex_adapters.load.folded.products import loha, lokr
from loraplex_adapters.load.folded.shared import randlora, regenerated, vera

ARITHMETIC: Mapping[str, Arithmetic] = {
    "gralora": gralora,
    "loha": loha,
    "lokr": lokr,
    "miss": miss,
    "randlora": randlora,
    "vera": vera,
}
"""Every arithmetic by the name in `Fold`."""


def factors(
    module: ModuleSpec, tensors: Tensors, base: BaseWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [rank, fan_in] and B transposed [rank, fan_out], multiplied by the scale."""
    fold = module.fold
    assert fold is not None
    found = ARITHMETIC[fold.arithmetic](module, tensors, base)
    least = min(fold.fan_in, fold.fan_out)
    if not isinstance(found, torch.Tensor) and found[0].shape[0] > least:
        found = found[1] @ found[0]
    if not isinstance(found, torch.Tensor):
        a, b = found
    elif fold.fan_out <= fold.fan_in:
        a, b = found, torch.eye(fold.fan_out)
    else:
        a, b = torch.eye(fold.fan_in), found
    assert a.shape[0] == module.rank, "the reader computed the rank from the same shapes"
    return a, b.T * module.scale


__all__ = ["ARITHMETIC", "factors", "regenerated"]
