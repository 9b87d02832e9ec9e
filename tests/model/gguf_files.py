"""Tiny models as GGUF files, converted as llama.cpp's converter does, without quantisation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map
from loraplex_model.base import families
from loraplex_model.checkpoints.gguf.names import ROPE_FACTORS
from transformers import PreTrainedModel

from model import tiny

ARCHITECTURES = {"mistral": "llama"}
"""GGUF architectures by `model_type`, where they differ."""

INTERLEAVED = {"llama"}


def write(
    variant: str,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: Collection[str] = (),
    parts: int = 0,
) -> Path:
    """Writes a variant of `tiny.VARIANTS`.

    Args:
        keys: further metadata, or other values of the converter's own; None leaves a key out.
            "~" before a key stands for the architecture.
        tensors: further tensors, or others in place of the model's.
        without: names of tensors that are left out.
        parts: number of tensors in each file of a split model; 0 writes one file.
    """
    model = tiny.build(variant)
    kind = architecture(model)
    writer = gguf.GGUFWriter(None, kind, split_max_tensors=parts)
    for key, value in (settings(model) | dict(keys or {})).items():
        if value is not None:
            add(writer, key.replace("~", kind), value)
    found = converted(model) | dict(tensors or {})
    for name, values in found.items():
        if name not in without:
            writer.add_tensor(name, values)
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
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
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
        "~.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "~.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "~.rope.dimension_count": width,
        "~.vocab_size": config.vocab_size,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab_size)],
        "tokenizer.ggml.scores": [0.0] * config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def converted(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names and in its layout."""
    config, kind = model.config, architecture(model)
    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(by_name[kind], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        module, _, ending = name.rpartition(".")
        if name == families.LM_HEAD and config.tie_word_embeddings:
            continue
        count = heads.get(module.rpartition(".")[2])
        if kind in INTERLEAVED and count:
            rows = tensor.reshape(count, 2, -1, *tensor.shape[1:])
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        found[f"{names.get_name(module)}.{ending}"] = tensor.contiguous().numpy()
    if config.rope_parameters["rope_type"] == "llama3":
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        default = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        scaled = families.decoder_config(config.to_dict()).rope_inv_freq
        found[ROPE_FACTORS] = (default / torch.tensor(scaled)).numpy()
    return found
