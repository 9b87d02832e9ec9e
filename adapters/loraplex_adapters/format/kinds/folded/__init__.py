"""Kinds whose tensors fold into LoRA's A and B at load, one table each; see `base`."""

from __future__ import annotations

from loraplex_adapters.format.kinds.folded.deft import DEFT
from loraplex_adapters.format.kinds.folded.delora import DELORA
from loraplex_adapters.format.kinds.folded.gralora import GRALORA
from loraplex_adapters.format.kinds.folded.hra import HRA
from loraplex_adapters.format.kinds.folded.loha import LOHA
from loraplex_adapters.format.kinds.folded.lokr import LOKR
from loraplex_adapters.format.kinds.folded.miss import MISS
from loraplex_adapters.format.kinds.folded.peanut import PEANUT
from loraplex_adapters.format.kinds.folded.poly import POLY
from loraplex_adapters.format.kinds.folded.randlora import RANDLORA
from loraplex_adapters.format.kinds.folded.vblora import VBLORA
from loraplex_adapters.format.kinds.folded.vera import PVERA, VERA

FOLDED = (
    DEFT,
    DELORA,
    GRALORA,
    HRA,
    LOHA,
    LOKR,
    MISS,
    PEANUT,
    POLY,
    PVERA,
    RANDLORA,
    VBLORA,
    VERA,
)
"""The folded kinds, in the order of the support matrix."""

__all__ = ["FOLDED"]
