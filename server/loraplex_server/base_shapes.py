"""The base model's shapes for commands that check adapters without a server."""

from __future__ import annotations

from pathlib import Path

from loraplex_adapters.base_shapes import shapes_of
from loraplex_adapters.format.spec import BaseShapes

from loraplex_server.config import Config


def load_shapes(config: Config) -> BaseShapes:
    """The shapes of the configured model, which is mapped from the cache, or converted first.

    Imports torch. Raises `Refusal`.
    """
    import torch
    from loraplex_model.checkpoints.load import load_base

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    weights = load_base(config.model, dtype, Path(config.cache)).weights
    return shapes_of(weights, config.dtype)
