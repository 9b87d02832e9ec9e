"""Names and sizes of floating types, and the alignment of tensors; `ops.dtypes` has torch's own."""

from __future__ import annotations

ITEM_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element, by torch's name of the type."""

SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Torch's name of each type that adapters' weights may have, by its name in safetensors files."""

ALIGNMENT = 64
"""Every tensor of a packed adapter starts at a multiple of this many bytes: a cache line, a full
AVX-512 vector."""
