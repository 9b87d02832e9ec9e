"""Torch's types by the names that configurations and safetensors files use."""

from __future__ import annotations

import torch

from loraplex_model.base.dtypes import ITEM_SIZES, SAFETENSORS

BY_NAME: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_SIZES}
"""Floating types by torch's own name: "float32", "bfloat16", ..."""

BY_SAFETENSORS = {short: BY_NAME[name] for short, name in SAFETENSORS.items()}
"""Types of adapters' weights by their names in safetensors files: "F32", "BF16", ..."""

SAFETENSORS_NAMES = {dtype: short for short, dtype in BY_SAFETENSORS.items()} | {
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""Names in safetensors files of every type that is written to one."""
