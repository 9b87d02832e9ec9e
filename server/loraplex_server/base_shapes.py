"""The base model's shapes for commands that check adapters without a server."""

from __future__ import annotations

from pathlib import Path

from loraplex_adapters.spec import BaseShapes

from loraplex_server.config import Config


def load_shapes(config: Config) -> BaseShapes:
    """The shapes of the configured model, which is mapped from the cache, or converted first.

    Imports torch. Raises `ModelError`.
    """
    import torch
    from loraplex_model.load import load_base

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    weights = load_base(config.model, dtype, Path(config.cache)).weights
    model = weights.config
    biased = [*("q_proj", "k_proj", "v_proj") * model.qkv_bias, *("o_proj",) * model.o_bias]
    return BaseShapes(
        num_layers=model.num_layers,
        projections=model.projection_shapes(),
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        head_dim=model.head_dim,
        biased=frozenset(biased),
        qk_norm=model.qk_norm,
        tie_embeddings=model.tie_embeddings,
        fingerprint=weights.fingerprint,
        dtype=config.dtype,
    )
