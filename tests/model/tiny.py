"""Tiny random models of every family, written with transformers, and the oracle for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.ops import nf4
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 128

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied-bias": (
        LlamaConfig,
        {"hidden_size": 128, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 32},
    ),
    "llama-odd-sizes": (
        LlamaConfig,
        {
            "hidden_size": 80,
            "intermediate_size": 144,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
        },
    ),
    "llama-rope-linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-rope-llama3": (LlamaConfig, {"rope_parameters": _LLAMA3}),
    "llama-rope-yarn": (LlamaConfig, {"rope_parameters": _YARN}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralConfig, {"sliding_window": 7, "head_dim": 32}),
    "qwen2": (Qwen2Config, {"hidden_size": 192, "num_attention_heads": 6}),
    "qwen2-window": (
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-window-bias": (
        Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}


def build(variant: str, *, seed: int = 0) -> PreTrainedModel:
    """A model in float32 whose weights bfloat16 can hold too.

    They are large enough that a wrong position, head or neighbour shows in the logits.
    """
    kind, changes = VARIANTS[variant]
    model = AutoModelForCausalLM.from_config(kind(**_SHAPE | changes), dtype=torch.float32)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=random)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name or "bias" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def write(variant: str, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """Saves the variant as a checkpoint directory."""
    build(variant, seed=seed).save_pretrained(directory, **options)
    return directory


def oracle(variant: str, *, seed: int = 0) -> PreTrainedModel:
    """Hugging Face's model with every projection rounded to NF4 by bitsandbytes."""
    import bitsandbytes.functional as bnb

    model = build(variant, seed=seed)
    for layer in range(model.config.num_hidden_layers):
        for module in PROJECTIONS:
            block = "mlp" if module in PROJECTIONS[4:] else "self_attn"
            weight = model.get_parameter(f"model.layers.{layer}.{block}.{module}.weight")
            if weight.shape[1] % 64:
                # bitsandbytes' AVX-512 path takes blocks to lie within rows
                rounded = nf4.dequantize(nf4.quantise(weight.data))
            else:
                rounded = bnb.dequantize_4bit(
                    *bnb.quantize_4bit(
                        weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
                    )
                )
            weight.data.copy_(rounded)
    return model
