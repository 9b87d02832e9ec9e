"""Tiny random models of the families, written with transformers, and the oracle for each.

A new family needs an entry in `VARIANTS`, and every feature of its row one that shows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loraplex_model.ops import nf4
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"head_dim": 32}
_LOCAL: dict[str, Any] = {
    "sliding_window": 7,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ],
}
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_TWO_BASES = {
    "sliding_attention": _DEFAULT,
    "full_attention": {"rope_type": "linear", "rope_theta": 200000.0, "factor": 4.0},
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 24,
    "partial_rotary_factor": 0.75,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mlp-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "gemma": ("gemma", _HEADS),
    "gemma2": ("gemma2", {**_HEADS, **_LOCAL, "query_pre_attn_scalar": 24}),
    "gemma2-strong-caps": (
        "gemma2",
        {**_HEADS, **_LOCAL, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        {**_HEADS, **_LOCAL, "rope_parameters": _TWO_BASES, "query_pre_attn_scalar": 48},
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 9}),
    "phi4-mini": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 24,
            "rope_parameters": _LONG,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "smollm3-window-bias": (
        "smollm3",
        {
            **_LOCAL,
            "use_sliding_window": True,
            "no_rope_layers": [1, 1, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            **_LOCAL,
            "rope_parameters": {
                "sliding_attention": _DEFAULT,
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        },
    ),
    "glm": ("glm", {**_HEADS, "rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}}),
    "glm4": ("glm4", {**_HEADS, "rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {**_LOCAL, "logit_scale": 0.5}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 6, "use_bias": False}),
    "stablelm": (
        "stablelm",
        {"rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.25}, "use_qkv_bias": True},
    ),
    "stablelm-parallel": (
        "stablelm",
        {
            "rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5},
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "ministral": ("ministral", {**_HEADS, **_LOCAL}),
    "ministral3": (
        "ministral3",
        {
            **_HEADS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_HEADS,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": False,
        },
    ),
    "helium": ("helium", {"head_dim": 16, "attention_bias": True}),
    "ernie4_5": ("ernie4_5", {**_HEADS, "use_bias": True}),
}


def build(variant: str, *, seed: int = 0) -> PreTrainedModel:
    """A model in float32 whose weights bfloat16 can hold too.

    They are large enough that a wrong position, head or neighbour shows in the logits.
    """
    kind, changes = VARIANTS[variant]
    config = CONFIG_MAPPING[kind](**{**_SHAPE, **changes})
    return randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with random weights of all its parameters, for evaluation."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(parameter.mean() + 0.2 * noise)  # around 0 in Gemma, 1 elsewhere
            elif "embed" in name or name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def write(variant: str, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """Saves the variant as a checkpoint directory."""
    build(variant, seed=seed).save_pretrained(directory, **options)
    return directory


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every matrix of its layers rounded to NF4 by bitsandbytes, in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            module.weight.data.copy_(_as_nf4(module.weight.data))
        if name.endswith(".experts"):  # one tensor for all experts, [experts, out, in]
            for expert in range(module.gate_up_proj.shape[0]):
                for part in module.gate_up_proj.data[expert].chunk(2):
                    part.copy_(_as_nf4(part))
                down = module.down_proj.data[expert]
                down.copy_(_as_nf4(down))
    return model


def _as_nf4(weight: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    if weight.shape[1] % 64:
        # bitsandbytes' AVX-512 path takes blocks to lie within rows
        return nf4.dequantize(nf4.quantise(weight))
    values: torch.Tensor = bnb.dequantize_4bit(
        *bnb.quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
    )
    return values
