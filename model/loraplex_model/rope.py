"""Rotary positions: the frequencies a checkpoint asks for, and the rotation itself."""

from __future__ import annotations

from typing import Any

import torch

from loraplex_model import autograd
from loraplex_model.errors import ModelError

SCALINGS = ("linear", "llama3", "yarn")
"""Scaled frequencies that do not depend on how long the sequence has become.

"dynamic" and "longrope" do, so keys already in the cache would have been rotated by other
frequencies than the queries that meet them.
"""


def inverse_frequencies(config: Any) -> tuple[tuple[float, ...], float]:
    """The head_dim / 2 inverse frequencies and the factor on cos and sin, of a Hugging Face config.

    Scaled kinds are computed by transformers itself. Raises `ModelError` for kinds that cannot be.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *SCALINGS):
        raise ModelError(
            "MODEL_UNSUPPORTED",
            f"rope_type {kind!r} is not supported; supported are default, {', '.join(SCALINGS)}",
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("MODEL_UNSUPPORTED", "partial_rotary_factor other than 1 is not supported")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config)
        return tuple(frequencies.tolist()), float(scale)
    width = head_dim(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0


def head_dim(config: Any) -> int:
    """Width of one attention head of a Hugging Face config."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def tables(
    positions: torch.Tensor, inv_freq: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [T, 1, head_dim / 2], of int positions [T]."""
    angles = positions.float()[:, None, None] * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates heads [T, heads, head_dim]; pairs are (i, i + head_dim / 2), as in Hugging Face."""
    if torch.is_grad_enabled():
        return autograd.rotate(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
