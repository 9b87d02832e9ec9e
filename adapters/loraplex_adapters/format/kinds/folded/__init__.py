"""Kinds whose tensors fold into LoRA's A and B at load, one table each; see `base`."""

from __future__ import annotations

from loraplex_adapters.format.kinds.folded.loha import LOHA

FOLDED = (LOHA,)
"""The folded kinds, in the order of the support matrix."""

__all__ = ["FOLDED"]
