"""Writes adapter directories byte by byte, so that tests can make them wrong in any way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from loraplex_adapters.format.modules import module_path
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.info import BaseInfo
from numpy.typing import NDArray

llama_path = partial(module_path, "LlamaForCausalLM")
"""A module's path in models that name their modules as Llama does: `llama_path(layer, module)`."""


def base_info(
    fingerprint: str = "sha256:" + "ba5e" * 16, dtype: str = "float32", **config: Any
) -> BaseInfo:
    """A small base; `config` overrides fields of its `DecoderConfig`."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_inv_freq": (1.0, 0.1, 0.01, 0.001),
        "rope_scale": 1.0,
        "max_positions": 64,
        "qkv_bias": True,
        "o_bias": False,
        "qk_norm": True,
        "tie_embeddings": False,
        "sliding_windows": (None, None),
    }
    return BaseInfo(DecoderConfig(**fields | config), fingerprint, dtype)


BASE = base_info()
BASE_JSON = msgspec.json.encode(BASE).decode()
"""`BASE` for a script in another process."""

SMOLLM = base_info(
    fingerprint="",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    qkv_bias=False,
    qk_norm=False,
)
"""The base of the demo, SmolLM2-135M, as far as LoRA adapters are checked against it."""

Tensors = dict[str, NDArray[np.float32]]
Entry = dict[str, object]


def key(layer: int, module: str, half: str) -> str:
    """PEFT's name of a tensor."""
    return f"base_model.model.{llama_path(layer, module)}.lora_{half}.weight"


def lora_tensors(
    modules: Mapping[tuple[int, str], int], base: BaseInfo = BASE, seed: int = 0
) -> Tensors:
    """Random float32 A and B for modules of the given ranks."""
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for (layer, module), rank in modules.items():
        fan_in, fan_out = base.config.projection_shapes()[module]
        tensors[key(layer, module, "A")] = rng.normal(size=(rank, fan_in)).astype(np.float32)
        tensors[key(layer, module, "B")] = rng.normal(size=(fan_out, rank)).astype(np.float32)
    return tensors


def everywhere(*modules: str, rank: int = 4, layers: int = 2) -> dict[tuple[int, str], int]:
    """The same rank for these modules of every layer."""
    return {(layer, module): rank for layer in range(layers) for module in modules}


def lora_config(**changes: object) -> dict[str, object]:
    """A configuration as PEFT writes it, with `changes`; the value `...` removes a key."""
    config: dict[str, object] = {
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


def entries(tensors: Tensors) -> dict[str, Entry]:
    """The header's table for consecutive float32 tensors."""
    table: dict[str, Entry] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return table


def safetensors_bytes(header: object, data: bytes) -> bytes:
    """A file with any header, given as bytes or as a value to encode, and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weights_bytes(
    tensors: Tensors, change: Callable[[dict[str, Entry]], object] | None = None
) -> bytes:
    """A valid file of float32 tensors, after `change` has modified its header's table."""
    table = entries(tensors)
    if change:
        change(table)
    return safetensors_bytes(table, b"".join(t.tobytes() for t in tensors.values()))


def write_adapter(
    directory: Path,
    config: Mapping[str, object] | bytes | None = None,
    weights: bytes | Tensors | None = None,
) -> Path:
    """Writes a directory with both files, by default a valid rank-4 adapter of q and v."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = lora_config()
    if weights is None:
        weights = lora_tensors(everywhere("q_proj", "v_proj"))
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    data = weights if isinstance(weights, bytes) else weights_bytes(weights)
    (directory / "adapter_config.json").write_bytes(text)
    (directory / "adapter_model.safetensors").write_bytes(data)
    return directory
