"""More adapters that fold into A and B at load: kinds by the served weight, variants of LoRA."""

from __future__ import annotations

from typing import Any

import torch
from adapters.peft_files import HEAD, TIED, Case, Q

FIRST, DOWN = (0, Q), (0, "down_proj")
DELORA = "delora_A delora_B delora_lambda delora_w_norm"
DEFT = "deft_P deft_R"
TARGETS = [Q, "k_proj", "down_proj"]


def strong(name: str, factor: float) -> Any:
    """An edit that multiplies the tensors of this name, so that the adapter changes an answer."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if name in key:
                tensors[key] = tensors[key] * factor

    return edit


CASES: dict[str, Case] = {
    "delora": Case("llama", "DeloraConfig", {"target_modules": [*TARGETS, "lm_head"], "r": 3}, {FIRST: DELORA, HEAD: DELORA}),
    "delora with biases": Case(
        TIED,
        "DeloraConfig",
        {
            "target_modules": [*TARGETS, "o_proj"],
            "r": 4,
            "delora_lambda": 3,
            "rank_pattern": {"k_proj": 7, "layers.1.self_attn.q_proj": 2},
            "lambda_pattern": {"o_proj": 2},
            "bias": "all",
            "modules_to_save": ["lm_head"],
            "init_weights": False,
        },
        {FIRST: f"{DELORA} bias", (0, "v_proj"): "bias"},
    ),
    "hra": Case("llama", "HRAConfig", {"target_modules": [*TARGETS, "lm_head"], "r": 4}, {FIRST: "hra_u", HEAD: "hra_u"}),
    "hra, orthogonal": Case(
        TIED,
        "HRAConfig",
        {
            "target_modules": "all-linear",
            "exclude_modules": ["up_proj"],
            "r": 5,
            "apply_GS": True,
            "bias": "hra_only",
            "init_weights": False,
        },
        {FIRST: "hra_u bias", DOWN: "hra_u"},
    ),
    "deft": Case(
        "llama", "DeftConfig", {"target_modules": [*TARGETS, "lm_head"], "r": 3, "alpha": 4}, {FIRST: DEFT}
    ),
    "para": Case(
        TIED,
        "DeftConfig",
        {
            "target_modules": TARGETS,
            "r": 6,
            "decomposition_method": "qr",
            "para": True,
            "bias": "all",
        },
        {FIRST: "deft_P bias"},
    ),
    "deft by qr": Case(
        "qwen2",
        "DeftConfig",
        {"target_modules": TARGETS, "r": 200, "decomposition_method": "qr", "init_weights": False},
        {FIRST: DEFT},
    ),
    "peanut": Case(
        "llama", "PeanutConfig", {"target_modules": TARGETS, "r": 4}, {FIRST: "peanut_A.weight peanut_B.weight"}
    ),
    "peanut, deep": Case(
        TIED,
        "PeanutConfig",
        {"target_modules": [*TARGETS, "o_proj"], "r": 6, "depth": 2, "act_fn": "gelu", "scaling": 0.5},
        {},
    ),
    "vblora": Case(
        "llama",
        "VBLoRAConfig",
        {"target_modules": TARGETS, "r": 3, "num_vectors": 9, "vector_length": 16},
        {FIRST: "vblora_logits_A vblora_logits_B base_model.vblora_vector_bank"},
        edit=strong("vector_bank", 8.0),
    ),
    "vblora with biases": Case(
        TIED,
        "VBLoRAConfig",
        {
            "target_modules": [*TARGETS, "lm_head"],
            "r": 2,
            "num_vectors": 5,
            "topk": 3,
            "vector_length": 64,
            "bias": "vblora_only",
        },
        {},
    ),
}
