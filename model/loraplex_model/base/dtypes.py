"""How tensors lie in memory: bytes per element and the alignment of packed tensors."""

from __future__ import annotations

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element, by the name of the dtype."""

ALIGNMENT = 64
"""Every tensor of a packed adapter starts at a multiple of this many bytes: a cache line, a full
AVX-512 vector."""
