"""Rotary position embedding: the tables of cosines and sines, and the rotation of heads."""

from __future__ import annotations

import torch

from loraplex_model.ops import autograd


def tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of cosines and sines, float32 [T, 1, width / 2], for int positions [T].

    `inv_freq` is [width / 2]; `scale` multiplies both tables.
    """
    angles = positions.float()[:, None, None] * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotates the first `width` numbers of each head of x [T, heads, head_dim]; others stay.

    cos and sin are [T, 1, width / 2]. Pairs are (i, i + width / 2) as in transformers' Llama, or
    (2 i, 2 i + 1) if `interleaved`.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width].contiguous(), cos, sin, interleaved=interleaved)
        return torch.cat((turned, x[..., width:]), dim=-1)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        pairs = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(pairs, dim=-1).flatten(-2)
    if torch.is_grad_enabled():
        return autograd.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
