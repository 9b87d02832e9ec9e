"""From a Hugging Face configuration to a `DecoderConfig`, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Reason, Refusal

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The supported architectures, and the `model_type` that each has."""

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

SCALINGS = ("linear", "llama3", "yarn")
"""Scaled frequencies that do not depend on how long the sequence has become.

"dynamic" and "longrope" do, so keys already in the cache would have been rotated by other
frequencies than the queries that meet them.
"""

_PARENTS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "q_norm": "self_attn",
    "k_norm": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def tensor_name(layer: int, module: str, kind: str = "weight") -> str:
    """A layer's tensor as all supported checkpoints call it; `module` is "q_proj", "q_norm", ..."""
    parent = _PARENTS.get(module)
    path = f"{parent}.{module}" if parent else module
    return f"model.layers.{layer}.{path}.{kind}"


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a `config.json`.

    Raises:
        Refusal: the architecture is not supported, wants code of its own, or has a feature that
            the decoder lacks.
    """
    architecture = _architecture(raw)
    config = _parse(architecture, raw)
    _refuse_unsupported(architecture, config)
    heads = config.num_attention_heads
    inv_freq, scale = inverse_frequencies(config)
    # Qwen2 has biases on q, k and v without saying so; Mistral never has any
    biased = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and config.attention_bias
    return DecoderConfig(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim(config),
        rms_norm_eps=config.rms_norm_eps,
        rope_inv_freq=inv_freq,
        rope_scale=scale,
        max_positions=config.max_position_embeddings,
        qkv_bias=architecture == "Qwen2ForCausalLM" or biased,
        o_bias=biased,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_embeddings=config.tie_word_embeddings,
        sliding_windows=_sliding_windows(architecture, config),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    supported = ", ".join(ARCHITECTURES)
    if "auto_map" in raw:
        raise Refusal(
            Reason.MODEL_UNSUPPORTED,
            "the model brings code of its own (auto_map), which is never run; "
            f"supported architectures: {supported}",
        )
    stated = raw.get("architectures") or []
    if not stated:
        by_type = {kind: name for name, kind in ARCHITECTURES.items()}
        stated = [by_type.get(raw.get("model_type", ""), raw.get("model_type", "none stated"))]
    if len(stated) != 1 or stated[0] not in ARCHITECTURES:
        raise Refusal(
            Reason.MODEL_UNSUPPORTED,
            f"architecture {', '.join(map(str, stated))} is not supported; supported: {supported}",
        )
    return str(stated[0])


def _parse(architecture: str, raw: Mapping[str, Any]) -> Any:
    """The transformers configuration object, which knows the defaults and the older spellings."""
    from transformers import CONFIG_MAPPING

    kind = ARCHITECTURES[architecture]
    if raw.get("model_type", kind) != kind:
        raise Refusal(
            Reason.MODEL_INVALID,
            f"config.json says {architecture} but model_type {raw['model_type']!r}",
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:  # transformers raises many kinds for a malformed configuration
        raise Refusal(Reason.MODEL_INVALID, f"config.json cannot be read: {error}") from error


def _refuse_unsupported(architecture: str, config: Any) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    faults = {
        f"hidden_act {config.hidden_act!r} (only silu)": config.hidden_act not in ("silu", "swish"),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "an odd width": any(
            width % 2 for width in (head_dim(config), config.hidden_size, config.intermediate_size)
        ),
        f"{heads} heads over {kv_heads} key-value heads": heads % (kv_heads or heads) != 0,
    }
    for fault, present in faults.items():
        if present:
            raise Refusal(Reason.MODEL_UNSUPPORTED, f"{architecture} with {fault} is not supported")


def _sliding_windows(architecture: str, config: Any) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise Refusal(
            Reason.MODEL_UNSUPPORTED, f"layer_types {sorted(set(kinds))} of {len(kinds)} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def inverse_frequencies(config: Any) -> tuple[tuple[float, ...], float]:
    """The head_dim / 2 inverse frequencies and the factor on cos and sin, of a Hugging Face config.

    Scaled kinds are computed by transformers itself. Raises `Refusal` for kinds that cannot be.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *SCALINGS):
        raise Refusal(
            Reason.MODEL_UNSUPPORTED,
            f"rope_type {kind!r} is not supported; supported are default, {', '.join(SCALINGS)}",
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise Refusal(
            Reason.MODEL_UNSUPPORTED, "partial_rotary_factor other than 1 is not supported"
        )
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
