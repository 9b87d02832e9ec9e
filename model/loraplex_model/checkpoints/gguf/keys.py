"""The metadata of a GGUF file as the contents of a `config.json`.

llama.cpp's converters describe the keys. Those that an architecture does not use are taken only
with the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loraplex_model.base.families import FAMILIES
from loraplex_model.checkpoints.gguf.architectures import GgufArchitecture, Windows
from loraplex_model.checkpoints.gguf.names import LONG_FACTORS
from loraplex_model.checkpoints.gguf.rope import rope_parameters
from loraplex_model.checkpoints.gguf.settings import GgufSettings

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (1,),
    "expert_count": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (1,),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (1,),
    "swin_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Values with which a setting changes nothing."""

_HARMLESS = (
    "vocab_size",  # the embeddings' number of rows
    "rope.scaling.finetuned",  # whether the scaling was there in training
)
"""Keys that change no computation, whatever their value."""

_EXPERTS = "expert_count"
_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"


def config_of(
    settings: GgufSettings, row: GgufArchitecture, tensors: Collection[str]
) -> dict[str, Any]:
    """The settings of the decoder under the names of `config.json`.

    `tensors` are the names of the file's tensors, from which some settings follow.

    Raises `Refusal`: MODEL_INVALID for a setting that is missing or out of bounds,
    MODEL_UNSUPPORTED for one that the decoder does not have. Both name it.
    """
    config = _shape(settings, row)
    width, layers = config["head_dim"], config["num_hidden_layers"]
    if layers > len(tensors):
        raise settings.invalid(
            "block_count", layers, f"at most {len(tensors)}, one for each tensor"
        )
    if row.by_width is not None:
        width_of_stream = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = width_of_stream if layers == row.by_width else width
    for key, (name, default) in row.numbers.items():
        value = settings.at_least_zero(key, default)
        if not value and default is None:
            raise settings.unsupported(key, "it must be above 0")
        config[name] = value or _unscaled(name, width)
    config |= row.entries
    config |= {name: f"blk.0.{tensor}" in tensors for name, tensor in row.tensors.items()}
    config |= {name: f"blk.0.{tensor}" not in tensors for name, tensor in row.lacks.items()}
    _add_windows(settings, row, config, _family(settings, row, config))
    two_lengths = row.two_lengths and LONG_FACTORS in tensors
    _add_positions(settings, row, config, two_lengths=two_lengths)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        settings.expect(key, width)
    if settings.is_unread("attention.scale"):
        settings.expect("attention.scale", 0, config.get("query_pre_attn_scalar", width) ** -0.5)
    for key, values in {**_NEUTRAL, **row.neutral}.items():
        if settings.is_unread(key):
            settings.expect(key, *values)
    for key in _HARMLESS:
        settings.ignore(key)
    settings.refuse_unread()
    return config


def _shape(settings: GgufSettings, row: GgufArchitecture) -> dict[str, Any]:
    heads = settings.integer("attention.head_count")
    hidden = settings.integer("embedding_length")
    epsilon, name = row.epsilon
    return {
        "max_position_embeddings": settings.integer("context_length"),
        "num_hidden_layers": settings.integer("block_count"),
        "intermediate_size": settings.integer("feed_forward_length"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": settings.integer("attention.key_length", max(hidden // heads, 1)),
        name: settings.number(epsilon),
    }


def _unscaled(name: str, width: int) -> float | None:
    """The entry of config.json for a factor or a cap that a file states as 0."""
    if name.endswith("softcapping"):
        return None
    return width**-0.5 if name == "attention_multiplier" else 1.0


def _family(settings: GgufSettings, row: GgufArchitecture, config: dict[str, Any]) -> str:
    """Adds the numbers of experts, and returns the family, which is another one with experts."""
    experts = row.experts
    if experts is None or (experts.family != row.family and not settings.natural(_EXPERTS, 0)):
        return row.family
    config[experts.count] = count = settings.integer(_EXPERTS)
    config[experts.used] = used = settings.integer("expert_used_count")
    if used > count:
        raise settings.invalid("expert_used_count", used, f"at most expert_count, {count}")
    if experts.width:
        config[experts.width] = settings.integer("expert_feed_forward_length")
    return experts.family


def _add_windows(
    settings: GgufSettings, row: GgufArchitecture, config: dict[str, Any], family: str
) -> None:
    """Adds `sliding_window` and `layer_types`, and the family, which may be one with windows."""
    windows, context = row.windows, config["max_position_embeddings"]
    if windows is None:
        if 0 < settings.natural(_WINDOW, 0) < context:
            raise settings.unsupported(_WINDOW, f"supported: 0, or {context} and more")
    else:
        window = settings.natural(_WINDOW, windows.default)
        config["sliding_window"] = window or None
        if windows.period:
            is_local = _pattern(settings, windows, config["num_hidden_layers"])
            config["layer_types"] = [
                "sliding_attention" if window and local else "full_attention" for local in is_local
            ]
        if window and windows.family:
            family = windows.family
        elif windows.family:
            del config["layer_types"]
    config["architectures"], config["model_type"] = [family], FAMILIES[family].model_type


def _pattern(settings: GgufSettings, windows: Windows, layers: int) -> list[bool]:
    """For each layer whether it has the window: a list in the file, or a period."""
    stated = settings.list(_PATTERN)
    if stated is None:
        period = settings.integer(_PATTERN, windows.period)
        return [(layer + 1) % period != 0 for layer in range(layers)]
    if len(stated) != layers:
        raise settings.unsupported(_PATTERN, f"the file states {layers} layers")
    return [bool(local) for local in stated]


def _add_positions(
    settings: GgufSettings, row: GgufArchitecture, config: dict[str, Any], *, two_lengths: bool
) -> None:
    """Adds `rope_parameters`."""
    width, context = config["head_dim"], config["max_position_embeddings"]
    parameters = rope_parameters(settings, context, two_lengths=two_lengths)
    rotated = settings.integer("rope.dimension_count", width)
    if rotated > width or (rotated < width and not row.partial):
        raise settings.unsupported("rope.dimension_count", f"the heads have {width} numbers")
    if row.partial:  # stated also if all are rotated, since it is not every family's default
        # transformers rounds the product with the width down
        factor = rotated / width
        parameters["partial_rotary_factor"] = (
            factor if int(width * factor) == rotated else (rotated + 0.5) / width
        )
    key = "attention.temperature_scale"
    if row.temperature and key in settings and (beta := settings.at_least_zero(key, 0.0)):
        original = parameters.setdefault("original_max_position_embeddings", context)
        settings.expect("attention.temperature_length", original)
        parameters["llama_4_scaling_beta"] = beta
    base = parameters["rope_theta"]
    local = row.windows.local_base if row.windows else None
    settings.expect("rope.dimension_count_swa", rotated)
    if local is None or config["model_type"] == "olmo2":
        settings.expect("rope.freq_base_swa", base)
        config["rope_parameters"] = parameters
        return
    local = settings.number("rope.freq_base_swa", local or base)
    config["rope_parameters"] = {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
