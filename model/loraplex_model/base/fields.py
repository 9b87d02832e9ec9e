"""Bounds on the numbers of a model's configuration, checked before anything is made of them.

A configuration is untrusted: one number too large would allocate tables or lists of that size, and
one that is zero or not finite would give a model whose every answer fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from loraplex_model.base.config import DecoderConfig, Rope
from loraplex_model.base.refusal import Refusal, model_invalid, model_unsupported

MAX_LAYERS: Final = 10_000
MAX_TABLE_BYTES: Final = 2 << 30
"""Most bytes of the tables of rotations: cosines and sines, float32, 4 * head_dim bytes a position.
With heads of 128 these are 4,194,304 positions."""

_WHOLE: Final[Mapping[str, tuple[int, int]]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 18),
    "intermediate_size": (1, 1 << 22),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 14),
    "max_position_embeddings": (1, 1 << 40),
    "original_max_position_embeddings": (1, 1 << 40),
    "sliding_window": (1, 1 << 40),
    "sliding_window_pattern": (1, MAX_LAYERS),
    "no_rope_layer_interval": (1, MAX_LAYERS),
    "num_experts": (0, 1 << 14),
    "num_local_experts": (0, 1 << 14),
    "num_experts_per_tok": (0, 1 << 14),
    "moe_intermediate_size": (0, 1 << 22),
    "decoder_sparse_step": (0, MAX_LAYERS),
}
"""The smallest and the largest value of each whole number."""

_POSITIVE: Final = frozenset(
    {
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "norm_epsilon",
        "rope_theta",
        "rope_local_base_freq",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_multiplier",
        "logits_scaling",
    }
)
"""Numbers that are positive. float32 holds them without rounding to 0."""

_POSITIVE_LISTS: Final = frozenset({"short_factor", "long_factor"})

_FINITE: Final = frozenset(
    {
        "embedding_multiplier",
        "residual_multiplier",
        "logit_scale",
        "mscale",
        "mscale_all_dim",
        "llama_4_scaling_beta",
    }
)
_SMALLEST, _LARGEST = 1e-30, 1e18

_MAY_BE_NULL: Final = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "original_max_position_embeddings",
        "attention_factor",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "partial_rotary_factor",
        "num_experts",
        "factor",
    }
)
_NESTED: Final = frozenset({"rope_scaling", "rope_parameters", "text_config"})
_MOST_FACTORS: Final = 1 << 13  # of a list: one for each pair of a head's values


def check_fields(raw: Mapping[str, Any]) -> None:
    """Checks every known number of a `config.json`, or of its equivalent from another format.

    Raises `Refusal` (MODEL_INVALID, MODEL_UNSUPPORTED) that names the field.
    """
    _check(raw, "")


def _check(fields: Mapping[str, Any], path: str) -> None:
    for name, value in fields.items():
        if value is None and name in _MAY_BE_NULL:
            continue
        at = f"{path}{name}"
        if name in _WHOLE:
            _whole(at, value, *_WHOLE[name])
        elif name in _POSITIVE or name in _FINITE:
            _real(at, value, name in _POSITIVE)
        elif name in _POSITIVE_LISTS:
            if not isinstance(value, list) or not 0 < len(value) <= _MOST_FACTORS:
                raise _wrong(at, value, f"a list of at most {_MOST_FACTORS} numbers")
            for each in value:
                _real(at, each, positive=True)
        elif isinstance(value, Mapping) and (name in _NESTED or path):
            _check(value, f"{at}.")


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(name, value, f"a whole number of at least {least}")
    if value > most:
        raise model_unsupported(
            f"the model's configuration has {name} {_shown(value)}, and at most {most} is "
            "supported; correct it, or fetch the model again"
        )


def _real(name: str, value: object, positive: bool) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(name, value, "a number")
    if not -_LARGEST <= value <= _LARGEST:  # true for NaN
        raise _wrong(name, value, f"a finite number of at most {_LARGEST:g}")
    if positive and value < _SMALLEST:
        raise _wrong(name, value, f"a positive number of at least {_SMALLEST:g}")
    if name.endswith("partial_rotary_factor") and value > 1:
        raise _wrong(name, value, "at most 1")


def _wrong(name: str, value: object, needed: str) -> Refusal:
    return model_invalid(
        f"the model's configuration has {name} {_shown(value)}, but it must be {needed}; correct "
        "it, or fetch the model again"
    )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."


def check_decoder(config: DecoderConfig) -> None:
    """Checks what was made of a configuration: sizes, tables of rotations, and every number.

    Raises `Refusal` (MODEL_INVALID, MODEL_UNSUPPORTED) that names the size or the number.
    """
    for name in ("head_dim", "num_heads", "num_kv_heads", "hidden_size", "intermediate_size"):
        if getattr(config, name) < 1:
            raise _wrong(name, getattr(config, name), "at least 1")
    for field in dataclasses.fields(config):
        for number in _floats(getattr(config, field.name)):
            if not math.isfinite(number):
                raise _wrong(field.name, number, "finite, and so must what it is made of")
    if config.num_experts and not 1 <= config.experts_per_token <= config.num_experts:
        needed = f"1 to {config.num_experts}, the number of experts"
        raise _wrong("num_experts_per_tok", config.experts_per_token, needed)
    widths = {2 * len(rope.inv_freq) for rope in config.ropes}
    if not all(2 <= width <= config.head_dim for width in widths):
        raise model_unsupported(
            f"the model's configuration rotates {max(widths)} of the {config.head_dim} numbers of "
            "a head; correct its partial_rotary_factor, or fetch the model again"
        )
    ropes = [*config.ropes, *([config.long_rope] if config.long_rope else [])]
    position_bytes = 8 * sum(len(rope.inv_freq) for rope in ropes)
    if config.max_positions * position_bytes > MAX_TABLE_BYTES:
        raise model_unsupported(
            f"the model's configuration has max_position_embeddings {config.max_positions}, whose "
            f"tables of rotations would take {config.max_positions * position_bytes / 1e9:.1f} GB; "
            f"at most {MAX_TABLE_BYTES // position_bytes} positions are supported: set it to the "
            "context that you need"
        )


def _floats(value: object) -> Iterator[float]:
    """All floats in a value of a configuration."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Rope):
        yield from (*value.inv_freq, value.scale)
    elif isinstance(value, tuple):
        for each in value:
            yield from _floats(each)
