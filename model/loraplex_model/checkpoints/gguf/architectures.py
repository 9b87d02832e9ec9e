"""The architectures of GGUF files, one row each: what their files state, and what they leave out.

The rows follow llama.cpp, which computes what a file leaves out in one way: the pattern of the
layers with a window, the layers without positions, the scale of Gemma's queries. Names of tensors
are those of the `gguf` package, and `families` has what the checkpoints of a family share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Windows:
    """Which layers see a window of `attention.sliding_window` positions.

    Attributes:
        period: every so many layers one sees all positions, the last of each group; 0 if none does.
            `attention.sliding_window_pattern` replaces it.
        default: the window of a file that states none; 0 for no windows, None if it must be stated.
        family: the family of a model with windows, if it has a name of its own.
        local_base: base of the rotary frequencies in layers with a window, if they have their own;
            0 for that of the other layers, which is not scaled.
    """

    period: int
    default: int | None = 0
    family: str = ""
    local_base: float | None = None


@dataclass(frozen=True, slots=True)
class GgufExperts:
    """How config.json states the experts of a mixture.

    Attributes:
        family: the architecture of Hugging Face's checkpoints of mixtures.
        count: entry for `expert_count`.
        used: entry for `expert_used_count`.
        width: entry for `expert_feed_forward_length`; "" if `feed_forward_length` is an expert's.
    """

    family: str
    count: str
    used: str = "num_experts_per_tok"
    width: str = ""


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """What the files of one architecture state in addition to the settings that all have.

    Attributes:
        family: the architecture of Hugging Face's checkpoints.
        epsilon: the key of the norms' epsilon, and its entry in config.json.
        numbers: entries of config.json by their key, each with the value for a file that does not
            state it; None for a key that must exist.
        entries: entries of config.json that no file states.
        neutral: keys that must have one of these values.
        tensors: entries of config.json that are true if the first layer has a tensor.
        lacks: entries of config.json that are true if it does not.
        partial: fewer numbers than a head has may be rotated (`rope.dimension_count`).
        windows: None if no layer has a window.
        divided: the file may hold divisors of the rotary frequencies.
        two_lengths: it may hold divisors for short and for long sequences (LongRoPE).
        by_width: number of layers of the model whose queries are scaled by the width of the
            residual stream for each head. Those of others are scaled by the head's.
        temperature: queries may have a factor that grows with their position.
        experts: None if no file is a mixture of experts.
    """

    family: str
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    numbers: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    entries: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    windows: Windows | None = None
    divided: bool = False
    two_lengths: bool = False
    by_width: int | None = None
    temperature: bool = False
    experts: GgufExperts | None = None


_LAYER_NORM = "attention.layer_norm_epsilon"

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "LlamaForCausalLM",
        divided=True,
        experts=GgufExperts("MixtralForCausalLM", "num_local_experts"),
    ),
    "mistral3": GgufArchitecture("Ministral3ForCausalLM", divided=True, temperature=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM"),
    "qwen3moe": GgufArchitecture(
        "Qwen3MoeForCausalLM",
        entries={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        experts=GgufExperts("Qwen3MoeForCausalLM", "num_experts", width="moe_intermediate_size"),
    ),
    "gemma": GgufArchitecture("GemmaForCausalLM"),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM",
        numbers={
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        },
        windows=Windows(2, default=4096),
        by_width=46,
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM",
        numbers={"final_logit_softcapping": ("final_logit_softcapping", 0.0)},
        entries={"attn_logit_softcapping": None},
        windows=Windows(6, local_base=10000.0),
        by_width=62,
    ),
    "phi3": GgufArchitecture("Phi3ForCausalLM", partial=True, windows=Windows(0), two_lengths=True),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", entries={"no_rope_layer_interval": 4}),
    "granite": GgufArchitecture(
        "GraniteForCausalLM",
        numbers={
            "attention.scale": ("attention_multiplier", 0.0),
            "embedding_scale": ("embedding_multiplier", 1.0),
            "residual_scale": ("residual_multiplier", 1.0),
            "logit_scale": ("logits_scaling", None),
        },
        neutral={"rope.scaling.finetuned": (True,)},  # llama.cpp's switch for positions
        divided=True,
    ),
    "olmo2": GgufArchitecture(
        "Olmo2ForCausalLM",
        windows=Windows(4, family="Olmo3ForCausalLM", local_base=0),
    ),
    "chatglm": GgufArchitecture("GlmForCausalLM", partial=True),
    "glm4": GgufArchitecture("Glm4ForCausalLM", partial=True),
    "command-r": GgufArchitecture(
        "CohereForCausalLM",
        epsilon=(_LAYER_NORM, "layer_norm_eps"),
        numbers={"logit_scale": ("logit_scale", None)},
        tensors={"use_qk_norm": "attn_q_norm.weight"},
    ),
    "cohere2": GgufArchitecture(
        "Cohere2ForCausalLM",
        epsilon=(_LAYER_NORM, "layer_norm_eps"),
        numbers={"logit_scale": ("logit_scale", None)},
        windows=Windows(4, default=None),
    ),
    "starcoder2": GgufArchitecture("Starcoder2ForCausalLM", epsilon=(_LAYER_NORM, "norm_epsilon")),
    "stablelm": GgufArchitecture(
        "StableLmForCausalLM",
        epsilon=(_LAYER_NORM, "layer_norm_eps"),
        neutral={"use_parallel_residual": (True, False)},  # the tensors decide
        tensors={"qk_layernorm": "attn_q_norm.weight"},
        lacks={"use_parallel_residual": "ffn_norm.weight"},
        partial=True,
    ),
    "ernie4_5": GgufArchitecture("Ernie4_5ForCausalLM"),
}
"""The architectures that are read, by `general.architecture`."""
