"""The supported families of models, one row each: what their checkpoints say, and their names.

A family that computes like Llama needs nothing but its row. `hf_config` reads a configuration by
these rows; `DecoderConfig` says what each setting means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from loraplex_model.base.config import BLOCKS, MODEL, Gate, Norm, NormSpan

Setting = str | Callable[[Any], Any]
"""Where a field of `DecoderConfig` comes from: an entry of config.json (null keeps the default), or
a function of the configuration as transformers reads it."""


class WindowLayers(Enum):
    """For which layers of a family `sliding_window` holds, whatever else its configuration says."""

    NONE = auto()
    ALL = auto()
    BY_TYPE = auto()


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of one architecture's checkpoints from Llama's, and its names in files.

    Attributes:
        model_type: the architecture's `model_type` in config.json.
        gguf: the architecture in GGUF files; "" if there are none.
        gguf_interleaved: GGUF files hold the rows of q and k in pairs (real and imaginary part).
        fixed: fields of `DecoderConfig` that are the same in all checkpoints.
        settings: fields of `DecoderConfig` that the configuration states.
        names: path within a layer of each module that Llama names otherwise or does not have, by
            its name in `DecoderConfig`; "{head}" and "{expert}" in a path stand for the number of a
            head or of an expert, each of which has a tensor of its own.
        windows: for which layers `sliding_window` holds.
        partial_rotary: `partial_rotary_factor` is read; elsewhere, whole heads are rotated.
        layer_ropes: gives for each layer whether it is rotated; None if all are.
    """

    model_type: str
    gguf: str = ""
    gguf_interleaved: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    windows: WindowLayers = WindowLayers.NONE
    partial_rotary: bool = False
    layer_ropes: Callable[[Any], list[bool]] | None = None


_ATTENTION_BIAS: Mapping[str, Setting] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_BIASES: Mapping[str, Setting] = {**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"}
_ALL_BIASES: Mapping[str, Setting] = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias")
_SANDWICH = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_OUTPUT_ONLY = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_GEMMA: Mapping[str, Any] = {"norm_offset": 1.0}
_GEMMA_SETTINGS: Mapping[str, Setting] = {
    **_ATTENTION_BIAS,
    "embed_scale": lambda config: config.hidden_size**0.5,
}
_LATER_GEMMA_SETTINGS: Mapping[str, Setting] = {
    **_GEMMA_SETTINGS,
    "activation": "hidden_activation",
    "attention_scale": lambda config: config.query_pre_attn_scalar**-0.5,
    "logit_softcap": "final_logit_softcapping",
}
_OLMO: Mapping[str, Any] = {
    "input_norms": False,
    "output_norms": True,
    "qk_norm": True,
    "qk_norm_span": NormSpan.ALL,
}
_GLM: Mapping[str, Any] = {"rope_interleaved": True, "joined": ("gate_up",)}
_COHERE: Mapping[str, Any] = {"norm": Norm.LAYER, "parallel": True, "rope_interleaved": True}
_COHERE_SETTINGS: Mapping[str, Setting] = {
    **_ATTENTION_BIAS,
    "rms_norm_eps": "layer_norm_eps",
    "logit_scale": "logit_scale",
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", "llama", gguf_interleaved=True, settings=_BIASES),
    "MistralForCausalLM": Family(
        "mistral", "llama", gguf_interleaved=True, windows=WindowLayers.ALL
    ),
    "Ministral3ForCausalLM": Family(
        "ministral3",
        "mistral3",
        gguf_interleaved=True,
        settings={"query_scale": lambda config: _query_scale(config.rope_parameters)},
        windows=WindowLayers.ALL,
    ),
    "MinistralForCausalLM": Family("ministral", windows=WindowLayers.BY_TYPE),
    "Qwen2ForCausalLM": Family(
        "qwen2", "qwen2", fixed={"qkv_bias": True}, windows=WindowLayers.BY_TYPE
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        "qwen3",
        fixed={"qk_norm": True},
        settings=_ATTENTION_BIAS,
        windows=WindowLayers.BY_TYPE,
    ),
    "GemmaForCausalLM": Family("gemma", "gemma", fixed=_GEMMA, settings=_GEMMA_SETTINGS),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        "gemma2",
        fixed={**_GEMMA, "output_norms": True},
        settings={**_LATER_GEMMA_SETTINGS, "attention_softcap": "attn_logit_softcapping"},
        names=_SANDWICH,
        windows=WindowLayers.BY_TYPE,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        "gemma3",
        fixed={**_GEMMA, "output_norms": True, "qk_norm": True},
        settings=_LATER_GEMMA_SETTINGS,
        names=_SANDWICH,
        windows=WindowLayers.BY_TYPE,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        "phi3",
        fixed={"joined": ("qkv", "gate_up")},
        windows=WindowLayers.ALL,
        partial_rotary=True,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        "smollm3",
        gguf_interleaved=True,
        settings=_BIASES,
        layer_ropes=lambda config: [bool(used) for used in config.no_rope_layers],
        windows=WindowLayers.BY_TYPE,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        "granite",
        gguf_interleaved=True,
        fixed={"scaled_prompts": True},
        settings={
            **_BIASES,
            "embed_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_scale": lambda config: 1 / config.logits_scaling,
        },
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", "olmo2", fixed=_OLMO, settings=_ATTENTION_BIAS, names=_OUTPUT_ONLY
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        "olmo2",
        fixed=_OLMO,
        settings=_ATTENTION_BIAS,
        names=_OUTPUT_ONLY,
        windows=WindowLayers.BY_TYPE,
    ),
    "GlmForCausalLM": Family(
        "glm",
        "chatglm",
        fixed=_GLM,
        settings={"qkv_bias": "attention_bias"},
        partial_rotary=True,
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        "glm4",
        fixed={**_GLM, "output_norms": True},
        settings={"qkv_bias": "attention_bias"},
        names={
            "attention_output_norm": "post_self_attn_layernorm",
            "mlp_output_norm": "post_mlp_layernorm",
        },
        partial_rotary=True,
    ),
    "CohereForCausalLM": Family(
        "cohere",
        "command-r",
        fixed={**_COHERE, "qk_norm_span": NormSpan.EACH},
        settings={**_COHERE_SETTINGS, "qk_norm": "use_qk_norm"},
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        "cohere2",
        fixed=_COHERE,
        settings=_COHERE_SETTINGS,
        layer_ropes=lambda config: [kind == "sliding_attention" for kind in config.layer_types],
        windows=WindowLayers.BY_TYPE,
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        "starcoder2",
        fixed={"norm": Norm.LAYER, "norm_bias": True, "gated": False},
        settings={**_ALL_BIASES, "rms_norm_eps": "norm_epsilon"},
        names={"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
        windows=WindowLayers.ALL,
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        "stablelm",
        fixed={"norm": Norm.LAYER, "norm_bias": True, "qk_norm_span": NormSpan.EACH},
        settings={
            "qkv_bias": "use_qkv_bias",
            "qk_norm": "qk_layernorm",
            "parallel": "use_parallel_residual",
            "rms_norm_eps": "layer_norm_eps",
        },
        names={
            "q_norm": "self_attn.q_layernorm.norms.{head}",
            "k_norm": "self_attn.k_layernorm.norms.{head}",
        },
        partial_rotary=True,
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        "llama",
        gguf_interleaved=True,
        fixed={"normalised_experts": True},
        settings={
            "num_experts": "num_local_experts",
            "experts_per_token": "num_experts_per_tok",
        },
        names={
            "router": "block_sparse_moe.gate",
            "gate_proj": "block_sparse_moe.experts.{expert}.w1",
            "up_proj": "block_sparse_moe.experts.{expert}.w3",
            "down_proj": "block_sparse_moe.experts.{expert}.w2",
        },
        windows=WindowLayers.ALL,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        "qwen3moe",
        fixed={"qk_norm": True},
        settings={
            **_ATTENTION_BIAS,
            "intermediate_size": "moe_intermediate_size",
            "num_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "normalised_experts": "norm_topk_prob",
        },
        names={
            "router": "mlp.gate",
            "gate_proj": "mlp.experts.{expert}.gate_proj",
            "up_proj": "mlp.experts.{expert}.up_proj",
            "down_proj": "mlp.experts.{expert}.down_proj",
        },
        windows=WindowLayers.ALL,
    ),
    "HeliumForCausalLM": Family(
        "helium",
        fixed={"rope_interleaved": True},
        settings={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5", "ernie4_5", fixed={"rope_interleaved": True}, settings=_ALL_BIASES
    ),
}
"""The supported families, by the architecture that config.json states."""

TEXT_PARTS: Mapping[str, tuple[str, ...]] = {
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM",),
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", "Ministral3ForCausalLM"),
}
"""Architectures of multimodal models, and the families that their text decoders can be of. Their
configuration is in `text_config`; images are not read."""

TEXT_FAMILIES = frozenset(family for families in TEXT_PARTS.values() for family in families)
"""Families that can be the text decoder of a multimodal model."""

ACTIVATIONS: Mapping[str, Gate] = {
    "silu": Gate.SILU,
    "swish": Gate.SILU,
    "gelu": Gate.GELU,
    "gelu_pytorch_tanh": Gate.GELU_TANH,
    "gelu_new": Gate.GELU_TANH,
}
"""The activations by the names that configurations give them."""

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
NORM_BIAS = "model.norm.bias"
LM_HEAD = "lm_head.weight"

TEXT_PREFIXES: Mapping[str, str] = {"model.language_model.": "model.", "language_model.": ""}
"""Beginnings of the names of a multimodal model's text decoder, and what a text model has there."""


def module_path(architecture: str, layer: int, module: str) -> str:
    """A module's path in an architecture's Hugging Face model: "model.layers.0.self_attn.q_proj".

    `module` is a projection, joined ones included, a norm of `LAYER_NORMS`, or, with layer `MODEL`,
    one of `MODEL_SITES`.
    """
    if layer == MODEL:
        return module if module == "lm_head" else f"model.{module}"
    path = FAMILIES[architecture].names.get(module)
    if path is None:
        path = ".".join(filter(None, (BLOCKS.get(module), module)))
    return f"model.layers.{layer}.{path}"


def tensor_name(architecture: str, layer: int, module: str, kind: str = "weight") -> str:
    """Name of a tensor in the family's checkpoints; as for `module_path`."""
    return f"{module_path(architecture, layer, module)}.{kind}"


def _query_scale(parameters: Mapping[str, Any]) -> tuple[float, ...]:
    beta = parameters.get("llama_4_scaling_beta")
    if not beta:
        return ()
    return float(beta), float(parameters["original_max_position_embeddings"])
