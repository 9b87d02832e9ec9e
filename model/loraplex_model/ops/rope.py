"""Rotary position embedding: the tables of cosines and sines, and the rotation of heads."""

from __future__ import annotations

import torch

from loraplex_model.ops import autograd


def tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of cosines and sines, float32 [T, 1, head_dim / 2], for int positions [T].

    `inv_freq` is [head_dim / 2]; `scale` multiplies both tables.
    """
    angles = positions.float()[:, None, None] * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads x [T, heads, head_dim]; pairs are (i, i + head_dim / 2), as in transformers."""
    if torch.is_grad_enabled():
        return autograd.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
