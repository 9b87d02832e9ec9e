"""How near a kernel's result has to be to the exact one."""

from __future__ import annotations

import torch


def near(found: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> None:
    """The two are apart by no more than `roundings` roundings to the compute type."""
    tolerance = roundings * (2**-8 if found.dtype == torch.bfloat16 else 4e-6)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance / 4)


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, by way of float32."""
    return exact.float().to(dtype)
