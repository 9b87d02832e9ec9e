"""The supported families of models: from a Hugging Face configuration to a `DecoderConfig`.

Families differ by data: one `Family` in `FAMILIES` each. A family that computes like Llama needs
nothing but its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex_model.base.config import BLOCKS, DecoderConfig
from loraplex_model.base.refusal import model_invalid, model_unsupported


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of one architecture's checkpoints from Llama's, and its names in files.

    Attributes:
        model_type: the architecture's `model_type` in config.json.
        gguf: the architecture in GGUF files.
        gguf_interleaved: GGUF files hold the rows of q and k in pairs (real and imaginary part).
        bias_options: entries of config.json that give projections biases: attention_bias (q, k, v
            and o), mlp_bias (gate, up and down).
        qkv_bias: q, k and v always have biases.
        qk_norm: query and key heads are normed before the rotation.
        window_everywhere: `sliding_window` holds for every layer; elsewhere, `layer_types` says for
            which.
    """

    model_type: str
    gguf: str
    gguf_interleaved: bool = False
    bias_options: tuple[str, ...] = ("attention_bias", "mlp_bias")
    qkv_bias: bool = False
    qk_norm: bool = False
    window_everywhere: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", "llama", gguf_interleaved=True),
    "MistralForCausalLM": Family(
        "mistral", "llama", gguf_interleaved=True, bias_options=(), window_everywhere=True
    ),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2", bias_options=(), qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3", bias_options=("attention_bias",), qk_norm=True),
}
"""The supported families, by the architecture that config.json states."""

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

SCALINGS = ("linear", "llama3", "yarn")
"""Supported kinds of RoPE scaling: those whose frequencies do not depend on the sequence's length.

With "dynamic" and "longrope" they do, so keys in the cache would have been rotated with other
frequencies than later queries.
"""


def tensor_name(layer: int, module: str, kind: str = "weight") -> str:
    """Name of a layer's tensor in all supported checkpoints; `module` is "q_proj", "q_norm", ..."""
    path = ".".join(filter(None, (BLOCKS.get(module), module)))
    return f"model.layers.{layer}.{path}.{kind}"


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a `config.json`.

    Raises:
        Refusal: the architecture is not supported, needs code of its own, or has a feature that
            the decoder lacks.
    """
    architecture = _architecture(raw)
    config = _parse(architecture, raw)
    _refuse_unsupported(architecture, config)
    heads = config.num_attention_heads
    inv_freq, scale = inverse_frequencies(config)
    family = FAMILIES[architecture]
    biased = "attention_bias" in family.bias_options and config.attention_bias
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
        qkv_bias=family.qkv_bias or biased,
        o_bias=biased,
        qk_norm=family.qk_norm,
        tie_embeddings=config.tie_word_embeddings,
        sliding_windows=_sliding_windows(family, config),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    supported = ", ".join(FAMILIES)
    if "auto_map" in raw:
        raise model_unsupported(
            "the model needs code of its own (auto_map), which is never run; "
            f"supported architectures: {supported}"
        )
    stated = raw.get("architectures") or []
    if not stated:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        stated = [by_type.get(raw.get("model_type", ""), raw.get("model_type", "none stated"))]
    if len(stated) != 1 or stated[0] not in FAMILIES:
        raise model_unsupported(
            f"architecture {', '.join(map(str, stated))} is not supported; supported: {supported}"
        )
    return str(stated[0])


def _parse(architecture: str, raw: Mapping[str, Any]) -> Any:
    """The configuration as transformers reads it, with defaults and older spellings resolved."""
    from transformers import CONFIG_MAPPING

    kind = FAMILIES[architecture].model_type
    if raw.get("model_type", kind) != kind:
        raise model_invalid(
            f"config.json states {architecture} but model_type {raw['model_type']!r}"
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:  # transformers raises many kinds for a malformed configuration
        raise model_invalid(f"config.json cannot be read: {error}") from error


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
            raise model_unsupported(f"{architecture} with {fault} is not supported")


def _sliding_windows(family: Family, config: Any) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if family.window_everywhere:
        return (window,) * layers
    kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise model_unsupported(f"layer_types {sorted(set(kinds))} of {len(kinds)} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def inverse_frequencies(config: Any) -> tuple[tuple[float, ...], float]:
    """The head_dim / 2 inverse frequencies of a Hugging Face config, and the factor on cos and sin.

    transformers computes the scaled kinds. Raises `Refusal` for kinds that cannot be.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *SCALINGS):
        raise model_unsupported(
            f"rope_type {kind!r} is not supported; supported are default, {', '.join(SCALINGS)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise model_unsupported("partial_rotary_factor other than 1 is not supported")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config)
        return tuple(frequencies.tolist()), float(scale)
    import torch

    width = head_dim(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0


def head_dim(config: Any) -> int:
    """Width of one attention head, from a Hugging Face config."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
