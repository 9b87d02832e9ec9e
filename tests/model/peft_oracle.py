"""PEFT as an oracle: bitsandbytes NF4 under LoRA adapters of many kinds, and their factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loraplex_model.adapters.delta import LoraFactors
from loraplex_model.base.config import PROJECTIONS
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank8-rslora": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": list(PROJECTIONS),
    },
    "rank16-patterns": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"k_proj": 4, "layers.1.self_attn.q_proj": 24},
        "alpha_pattern": {"o_proj": 40},
    },
    "rank64-one-layer": {
        "r": 64,
        "lora_alpha": 64,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1],
    },
}


def quantised(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint loaded by transformers as NF4, doubly quantised, computing in `dtype`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=dtype, device_map="cpu"
    )
    _compute_as_asked(model)
    return model.eval()


def round_in_place(model: PreTrainedModel) -> PreTrainedModel:
    """Rounds a float32 model's projections to NF4 by bitsandbytes, and keeps them unpacked.

    `Linear4bit` would unpack them at every step, which on a real model takes most of a minute.
    """
    import bitsandbytes.functional as bnb

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in PROJECTIONS:
            packed, state = bnb.quantize_4bit(
                module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            module.weight.data.copy_(bnb.dequantize_4bit(packed, state))
    return model.eval()


def _compute_as_asked(model: nn.Module) -> None:
    """bitsandbytes computes in bfloat16 on a CPU that can, whatever the compute dtype says."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_adapters(
    model: PreTrainedModel,
    adapters: dict[str, dict[str, Any]],
    *,
    size: float = 0.05,
    seed: int = 0,
) -> Any:
    """The PEFT model with every adapter, A and B both random and of std `size`."""
    names = list(adapters)
    peft = get_peft_model(model, LoraConfig(**adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, LoraConfig(**adapters[name]))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft.named_parameters()):
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=random))
    return peft.eval()


def factors_of(peft: Any, adapter: str) -> dict[tuple[int, str], LoraFactors]:
    """One adapter's tensors and scales, straight from PEFT's modules."""
    found = {}
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            parts = name.split(".")
            found[int(parts[parts.index("layers") + 1]), parts[-1]] = LoraFactors(
                module.lora_A[adapter].weight.detach(),
                module.lora_B[adapter].weight.detach(),
                float(module.scaling[adapter]),
            )
    return found
