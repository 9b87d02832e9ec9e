"""Kinds that fold into A and B: their arithmetic, by name, done once at load.

Callers use `factors`, and pass it what `regenerated` returns with the other tensors. `base` has
the contract of the functions in `ARITHMETIC`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights

from loraplex_adapters.format.modules import module_path
from loraplex_adapters.format.spec import ModuleSpec
from loraplex_adapters.load.folded.base import Arithmetic, Tensors
from loraplex_adapters.load.folded.blocks import gralora, miss
from loraplex_adapters.load.folded.mixtures import poly
from loraplex_adapters.load.folded.products import loha, lokr
from loraplex_adapters.load.folded.served import deft, hra, peanut
from loraplex_adapters.load.folded.shared import pvera, randlora, regenerated, vera
from loraplex_adapters.load.folded.variants import bdlora, kasa, qalora
from loraplex_adapters.load.folded.vectors import delora, vblora

ARITHMETIC: Mapping[str, Arithmetic] = {
    "bdlora": bdlora,
    "deft": deft,
    "delora": delora,
    "gralora": gralora,
    "hra": hra,
    "kasa": kasa,
    "loha": loha,
    "lokr": lokr,
    "miss": miss,
    "peanut": peanut,
    "poly": poly,
    "pvera": pvera,
    "qalora": qalora,
    "randlora": randlora,
    "vblora": vblora,
    "vera": vera,
}
"""Every arithmetic by the name in `Fold`."""


def factors(
    module: ModuleSpec, tensors: Tensors, base: BaseWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A [rank, fan_in] and B transposed [rank, fan_out], multiplied by the scale.

    Raises Refusal(ADAPTER_INVALID) if they have an element that is infinite or not a number.
    """
    fold = module.fold
    assert fold is not None
    found = ARITHMETIC[fold.arithmetic](module, tensors, base)
    least = min(fold.fan_in, fold.fan_out)
    # above the smaller width, the whole change with an identity is the smaller pair of factors
    if not isinstance(found, torch.Tensor) and found[0].shape[0] > least:
        found = found[1] @ found[0]
    if not isinstance(found, torch.Tensor):
        a, b = found
    elif fold.fan_out <= fold.fan_in:
        a, b = found, torch.eye(fold.fan_out)
    else:
        a, b = torch.eye(fold.fan_in), found
    assert a.shape[0] == module.rank, "the reader computed the rank from the same shapes"
    b = b.T * module.scale
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        path = module_path(base.config.architecture, module.layer, module.module)
        message = f"the tensors of {path} are so large that the change has infinite elements"
        raise Refusal(Reason.ADAPTER_INVALID, message, path)
    return a, b


__all__ = ["ARITHMETIC", "factors", "regenerated"]
