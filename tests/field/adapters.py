"""Adapter directories as people have them, for the tiny base and for the default one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from field.bases import FEED_FORWARD, HIDDEN

Tensors = dict[str, NDArray[Any]]

PREFIX = "base_model.model."


def random(*shape: int, seed: int = 0) -> NDArray[np.float16]:
    """Small numbers, the same for the same shape and seed."""
    return (0.1 * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(np.float16)


def config(**changes: Any) -> dict[str, Any]:
    """A LoRA configuration of rank 2 and scale 2, for the first layer's down projection."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
        "target_modules": ["down_proj"],
        "layers_to_transform": [0],
        **changes,
    }


def down(
    layer: int = 0,
    rank: int = 2,
    *,
    prefix: str = PREFIX,
    stem: str = "model.layers",
    a: str = "lora_A.weight",
    b: str = "lora_B.weight",
) -> Tensors:
    """A and B of a down projection of the tiny base, under any names."""
    at = f"{prefix}{stem}.{layer}.mlp.down_proj"
    return {f"{at}.{a}": random(rank, FEED_FORWARD), f"{at}.{b}": random(HIDDEN, rank, seed=1)}


def write(
    folder: Path,
    settings: Mapping[str, Any] | None,
    tensors: Tensors,
    name: str = "adapter_model.safetensors",
) -> Path:
    """Writes a directory with a configuration, unless it is None, and a file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    save_file(tensors, folder / name, {"format": "pt"})
    return folder
