"""Rotary positions in the metadata of GGUF files, as the `rope_parameters` of `config.json`.

llama.cpp multiplies the frequencies by 1 / factor (linear), or blends them with the unscaled ones
(YaRN), as transformers does. It states the factor on cosine and sine as `rope.scaling.attn_factor`,
times YaRN's own 1 + 0.1 ln(factor), which `rope.scaling.yarn_log_multiplier` divides.
"""

from __future__ import annotations

import math
from typing import Any

from loraplex_model.checkpoints.gguf.settings import GgufSettings

_THETA = 10000.0
"""Base of the frequencies of a file that states none."""


def rope_parameters(settings: GgufSettings, context: int, *, two_lengths: bool) -> dict[str, Any]:
    """Reads the keys below `rope.` other than the number of rotated dimensions.

    `two_lengths` is True for a file with divisors of the frequencies for short and for long
    sequences; the caller adds those.

    Raises `Refusal` (MODEL_UNSUPPORTED) for scaling that cannot be stated exactly.
    """
    plain = {
        "rope_type": "default",
        "rope_theta": settings.number("rope.freq_base", _THETA),
    }
    if two_lengths:
        settings.expect("rope.scaling.type", "longrope", "none", "linear")
        settings.expect("rope.scaling.factor", 1)
        return plain | {
            "rope_type": "longrope",
            "original_max_position_embeddings": settings.integer(
                "rope.scaling.original_context_length"
            ),
            "attention_factor": settings.number("rope.scaling.attn_factor"),
        }
    # linear is llama.cpp's default; scale_linear is the name of the factor in early files
    kind = settings.text("rope.scaling.type", "linear")
    early = settings.number("rope.scale_linear", 1.0)
    factor = settings.number("rope.scaling.factor", early)
    if kind == "yarn":
        return plain | _yarn(settings, factor, context)
    if kind not in ("none", "linear"):
        raise settings.unsupported("rope.scaling.type", "supported: 'none', 'linear', 'yarn'")
    if early not in (1.0, factor):
        raise settings.unsupported("rope.scale_linear", "rope.scaling.factor is another one")
    settings.expect("rope.scaling.attn_factor", 1)
    settings.ignore("rope.scaling.original_context_length")
    if kind == "none" or factor == 1:
        return plain
    return plain | {"rope_type": "linear", "factor": factor}


def _yarn(settings: GgufSettings, factor: float, context: int) -> dict[str, Any]:
    if factor < 1 or "rope.scaling.factor" not in settings:
        raise settings.unsupported(
            "rope.scaling.type",
            "rope.scaling.factor must be 1 or more; use the model's safetensors",
        )
    own = 1 + 0.1 * math.log(factor)
    divisor = 1.0
    key = "rope.scaling.yarn_log_multiplier"
    if key in settings:
        divisor = 1 + 0.1 * settings.number(key) * math.log(factor)
    attention = settings.number("rope.scaling.attn_factor", 1.0) * own / divisor
    settings.expect("rope.scaling.yarn_ext_factor", 1)
    # converters copy config.json's factor to this key, and llama.cpp computes its own instead
    settings.expect("rope.scaling.yarn_attn_factor", attention)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": settings.integer(
            "rope.scaling.original_context_length", context
        ),
        "attention_factor": attention,
        "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
    }
