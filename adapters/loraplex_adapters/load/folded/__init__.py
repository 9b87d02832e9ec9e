"""Kinds that fold into A and B: their arithmetic, by name, done once at load.

`factors` is what callers use. A function of `ARITHMETIC` returns A [columns, fan_in] and B
[fan_out, columns], float32, before the module's scale. It may have more columns than the module's
smaller width; `factors` then multiplies them out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Arithmetic, Tensors
from loraplex_adapters.load.folded.products import loha
from loraplex_adapters.load.folded.served import deft, hra, peanut
from loraplex_adapters.load.folded.variants import blocks, groups, kasa
from loraplex_adapters.load.folded.vectors import delora, vblora

ARITHMETIC: Mapping[str, Arithmetic] = {
    "blocks": blocks,
    "deft": deft,
    "delora": delora,
    "groups": groups,
    "hra": hra,
    "kasa": kasa,
    "loha": loha,
    "peanut": peanut,
    "vblora": vblora,
}
"""Every arithmetic by the name in `Fold`."""


def factors(
    module: ModuleSpec, tensors: Tensors, base: BaseWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [rank, fan_in] and B transposed [rank, fan_out], multiplied by the scale."""
    fold = module.fold
    assert fold is not None
    a, b = ARITHMETIC[fold.arithmetic](module, tensors, base)
    if a.shape[0] > min(fold.fan_in, fold.fan_out):
        whole = b @ a
        if fold.fan_out <= fold.fan_in:
            a, b = whole, torch.eye(fold.fan_out)
        else:
            a, b = torch.eye(fold.fan_in), whole
    assert a.shape[0] == module.rank, "the reader computed the rank from the same shapes"
    return a, b.T * module.scale


__all__ = ["ARITHMETIC", "factors"]
