"""Tiny models as GGUF files, converted as llama.cpp's converter does, without quantisation."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import tiny

ARCHITECTURES = {
    "mistral": "llama",
    "ministral3": "mistral3",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "glm": "chatglm",
    "cohere": "command-r",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
}
"""GGUF architectures by `model_type`, where they differ."""

INTERLEAVED = {"llama", "mistral3", "smollm3", "granite"}
WITHOUT_HEAD = {"gemma", "gemma2", "cohere2", "command-r"}


def write(variant: str, path: Path, keys: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Writes a variant of `tiny.VARIANTS`; as for `write_model`."""
    return write_model(_tiny(variant), path, keys, **options)


@functools.cache
def _tiny(variant: str) -> PreTrainedModel:
    return tiny.build(variant)


def write_model(
    model: PreTrainedModel,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
    parts: int = 0,
) -> Path:
    """Writes a model.

    Args:
        keys: further metadata, or other values of the converter's own; None leaves a key out.
            "~" before a key stands for the architecture.
        tensors: further tensors, or others in place of the model's; uint8 for bytes in Q8_0.
        without: names of tensors that are left out.
        parts: number of tensors in each file of a split model; 0 writes one file.
    """
    kind = architecture(model)
    writer = gguf.GGUFWriter(None, kind, split_max_tensors=parts)
    for key, value in (settings(model) | dict(keys or {})).items():
        if value is not None:
            add(writer, key.replace("~", kind), value)
    found = converted(model) | dict(tensors or {})
    for name, values in found.items():
        if name not in without:
            is_packed = values.dtype == np.uint8
            kind_of = gguf.GGMLQuantizationType.Q8_0 if is_packed else None
            writer.add_tensor(name, values, raw_dtype=kind_of)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds metadata of the type that Python's value suggests."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case _:
            writer.add_array(key, value)


def architecture(model: PreTrainedModel) -> str:
    """The architecture that llama.cpp's converter states."""
    kind = model.config.model_type
    return ARCHITECTURES.get(kind, kind)


def settings(model: PreTrainedModel) -> dict[str, Any]:
    """The metadata that the converter writes."""
    config, kind = model.config, architecture(model)
    width, rope = head_dim(config), parameters(config)
    epsilons = {
        "rms_epsilon": getattr(config, "rms_norm_eps", None),
        "epsilon": getattr(config, "layer_norm_eps", getattr(config, "norm_epsilon", None)),
    }
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "~.context_length": config.max_position_embeddings,
        "~.block_count": config.num_hidden_layers,
        "~.feed_forward_length": config.intermediate_size,
        "~.embedding_length": config.hidden_size,
        "~.attention.head_count": config.num_attention_heads,
        "~.attention.head_count_kv": config.num_key_value_heads,
        "~.attention.key_length": width,
        "~.attention.value_length": width,
        **{f"~.attention.layer_norm_{name}": value for name, value in epsilons.items()},
        "~.rope.freq_base": float(rope["rope_theta"]),
        "~.rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "~.vocab_size": config.vocab_size,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
        "tokenizer.ggml.scores": [0.0] * config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **_scaling(rope),
    }
    if getattr(config, "num_experts_per_tok", None):
        found |= {
            "~.expert_count": config.num_local_experts,
            "~.expert_used_count": config.num_experts_per_tok,
            "~.expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        }
    own = _OWN.get(kind)
    return found | own(config) if own else found


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    return {
        "~.rope.scaling.type": rope["rope_type"],
        "~.rope.scaling.factor": rope["factor"],
        "~.rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
    }


def _gemma(config: Any) -> dict[str, Any]:
    local = config.model_type == "gemma3_text"
    return {
        "~.attn_logit_softcapping": config.attn_logit_softcapping,
        "~.final_logit_softcapping": config.final_logit_softcapping,
        "~.attention.sliding_window": config.sliding_window,
        "~.rope.freq_base_swa": (
            config.rope_parameters["sliding_attention"]["rope_theta"] if local else None
        ),
    }


def _phi3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    is_long = rope["rope_type"] == "longrope"
    factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1] if is_long else None
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return {
        "~.attention.key_length": None,
        "~.attention.value_length": None,
        "~.attention.sliding_window": config.sliding_window or 0,
        "~.rope.scaling.original_context_length": original,
        "~.rope.scaling.attn_factor": factor,
    }


def _granite(config: Any) -> dict[str, Any]:
    return {
        "~.attention.scale": config.attention_multiplier,
        "~.embedding_scale": config.embedding_multiplier,
        "~.residual_scale": config.residual_multiplier,
        "~.logit_scale": config.logits_scaling,
    }


def _windows(config: Any) -> dict[str, Any]:
    if getattr(config, "sliding_window", None) is None:
        return {}
    return {
        "~.attention.sliding_window": config.sliding_window,
        "~.attention.sliding_window_pattern": [
            kind == "sliding_attention" for kind in config.layer_types
        ],
    }


def _cohere(config: Any) -> dict[str, Any]:
    return {
        "~.logit_scale": config.logit_scale,
        "~.attention.sliding_window": getattr(config, "sliding_window", None),
        "~.rope.scaling.type": "none",
    }


def _ministral3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "~.rope.scaling.yarn_log_multiplier": rope.get("mscale_all_dim"),
        "~.attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


_OWN = {
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _windows,
    "cohere2": _cohere,
    "command-r": _cohere,
    "stablelm": lambda config: {"~.use_parallel_residual": config.use_parallel_residual},
    "mistral3": _ministral3,
}
"""What the converters of single architectures write in addition to the others' metadata."""


def head_dim(config: Any) -> int:
    """Width of a head."""
    heads = config.num_attention_heads
    return getattr(config, "head_dim", None) or config.hidden_size // heads


def parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters of layers that see all positions."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def converted(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names and in its layout."""
    config, kind = model.config, architecture(model)
    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(by_name[kind], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found, stacked = {}, dict[str, list[torch.Tensor]]()
    for name, tensor in model.state_dict().items():
        module, _, ending = name.rpartition(".")
        if module == "lm_head" and (config.tie_word_embeddings or kind in WITHOUT_HEAD):
            continue
        count = heads.get(module.rpartition(".")[2])
        if kind in INTERLEAVED and count:
            rows = tensor.reshape(count, 2, -1, *tensor.shape[1:])
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("experts.gate_up_proj"):
            at = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=1)
            found[f"{at}.ffn_gate_exps.weight"] = gate.contiguous().numpy()
            found[f"{at}.ffn_up_exps.weight"] = up.contiguous().numpy()
            continue
        if name.endswith("experts.down_proj"):
            module, ending = name, "weight"
        if match := re.fullmatch(r"(.*layernorm)\.norms\.\d+", module):
            stacked.setdefault(f"{names.get_name(match[1])}.{ending}", []).append(tensor)
            continue
        found[f"{names.get_name(module)}.{ending}"] = tensor.contiguous().numpy()
    found |= {name: torch.stack(rows).numpy() for name, rows in stacked.items()}
    return found | _factors(config)


def _factors(config: Any) -> dict[str, np.ndarray]:
    rope = parameters(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    width = head_dim(config)
    default = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return {"rope_freqs.weight": (default / scaled).numpy()}
