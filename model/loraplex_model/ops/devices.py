"""The device that a setting names."""

from __future__ import annotations

import torch


def resolve(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if torch can use it, else the CPU.

    Raises RuntimeError for a name that torch does not know. A named device may be absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
