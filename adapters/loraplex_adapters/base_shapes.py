"""What adapters are checked against, read off a loaded base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_adapters.format.spec import BaseShapes

if TYPE_CHECKING:
    from loraplex_model.base.weights import BaseWeights


def shapes_of(weights: BaseWeights, dtype: str) -> BaseShapes:
    """The shapes of a base; `dtype` is what adapters are packed in: "float32" or "bfloat16"."""
    config = weights.config
    biased = [*("q_proj", "k_proj", "v_proj") * config.qkv_bias, *("o_proj",) * config.o_bias]
    return BaseShapes(
        num_layers=config.num_layers,
        projections=config.projection_shapes(),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        biased=frozenset(biased),
        qk_norm=config.qk_norm,
        tie_embeddings=config.tie_embeddings,
        fingerprint=weights.fingerprint,
        dtype=dtype,
    )
