"""The metadata of a GGUF file as the contents of a `config.json`.

llama.cpp's converters describe the keys. Those that no supported family uses are taken only with
the value that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
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


def config_of(settings: GgufSettings) -> dict[str, Any]:
    """The settings of the decoder under the names of `config.json`.

    Raises `Refusal`: MODEL_INVALID for a setting that is missing or out of bounds,
    MODEL_UNSUPPORTED for one that the decoder does not have. Both name it.
    """
    heads = settings.integer("attention.head_count")
    hidden = settings.integer("embedding_length")
    context = settings.integer("context_length")
    width = settings.integer("attention.key_length", max(hidden // heads, 1))
    config = {
        "max_position_embeddings": context,
        "num_hidden_layers": settings.integer("block_count"),
        "intermediate_size": settings.integer("feed_forward_length"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.integer("attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(settings, context),
    }
    settings.expect("attention.value_length", width)
    settings.expect("attention.scale", 0, width**-0.5)
    settings.expect("rope.dimension_count", width)
    _refuse_window(settings, context)
    for key, values in _NEUTRAL.items():
        settings.expect(key, *values)
    for key in _HARMLESS:
        settings.ignore(key)
    settings.refuse_unread()
    return config


def _refuse_window(settings: GgufSettings, context: int) -> None:
    """Takes a window that no position exceeds. llama.cpp does not apply others to these files."""
    key = "attention.sliding_window"
    if 0 < settings.natural(key) < context:
        raise settings.unsupported(key, f"supported: 0, or {context} and more")
