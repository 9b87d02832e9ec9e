"""LoRA factors as a plain PEFT adapter, which PEFT loads without missing or unexpected tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile

from loraplex_adapters.convert.export.directory import write_json
from loraplex_adapters.convert.export.factors import FactorsBySite
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapters.format.modules import EMBEDDING, PREFIX, ModulePaths


def write_peft(
    target: Path,
    factors: FactorsBySite,
    path: ModulePaths,
    *,
    base_model: str = "",
    dtype: torch.dtype = torch.float32,
    stamps: Mapping[str, str],
) -> None:
    """Creates the directory `target`: adapter_config.json and adapter_model.safetensors.

    Modules are named by their full paths, which `path` gives, and every scale is 1: the most common
    rank is both `r` and `lora_alpha`, and the others are listed in both patterns. `stamps` become
    metadata of the weights file, since PEFT would warn about them in the configuration.
    """
    target.mkdir()
    config = lora_config({path(site): f.rank for site, f in factors.items()}, base_model)
    write_json(target / CONFIG_FILE, config)
    with SafetensorsFile(target / WEIGHTS_FILE, 2 * len(factors), stamps) as file:
        for site, found in factors.items():
            a, b = "lora_A.weight", "lora_B.weight"
            if site == EMBEDDING:
                a, b = "lora_embedding_A", "lora_embedding_B"
            at = PREFIX + path(site)
            file.add(f"{at}.{a}", found.a.to(dtype))
            file.add(f"{at}.{b}", found.b.to(dtype))


def lora_config(ranks: Mapping[str, int], base_model: str) -> dict[str, Any]:
    """Configuration of a plain LoRA adapter of scale 1 with these ranks by module path."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        "alpha_pattern": others,
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": common,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "revision": None,
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
