"""A small valid adapter of every kind for `adapter_files.BASE`, also for spoiling and fuzzing."""

from __future__ import annotations

from typing import Any

import numpy as np
from adapters.adapter_files import BASE, Tensors, llama_path
from loraplex_adapters.format.modules import PREFIX

from adapters import folded_files

Config = dict[str, Any]

_COMMON: Config = {"inference_mode": True, "peft_version": "0.21.2", "task_type": "CAUSAL_LM"}
HIDDEN, VOCAB, KV = BASE.config.hidden_size, BASE.config.vocab_size, BASE.config.kv_size


def key(site: tuple[int, str], ending: str) -> str:
    """PEFT's name of a tensor."""
    return f"{PREFIX}{llama_path(*site)}.{ending}"


def _tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _sample(config: Config, shapes: dict[str, tuple[int, ...]]) -> tuple[Config, Tensors]:
    return {**_COMMON, **config}, _tensors(shapes)


def _factors(site: tuple[int, str], fan_in: int, fan_out: int, rank: int = 2) -> dict[str, Any]:
    return {
        key(site, "lora_A.weight"): (rank, fan_in),
        key(site, "lora_B.weight"): (fan_out, rank),
    }


Q0, V1, O0 = (0, "q_proj"), (1, "v_proj"), (0, "o_proj")
EMBED, HEAD = (-1, "embed_tokens"), (-1, "lm_head")
_LORA: Config = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": r"model\.layers\.0\..*q_proj",
}
_Q0 = _factors(Q0, 32, 32)
_ADALORA_Q0 = {
    key(Q0, "lora_A"): (3, 32),
    key(Q0, "lora_B"): (32, 3),
    key(Q0, "lora_E"): (3, 1),
}
_BOTTLENECK = {
    key((0, "mlp_bottleneck"), "bottleneck_down.weight"): (4, 32),
    key((0, "mlp_bottleneck"), "bottleneck_down.bias"): (4,),
    key((0, "mlp_bottleneck"), "bottleneck_up.weight"): (32, 4),
    key((0, "mlp_bottleneck"), "bottleneck_up.bias"): (32,),
    key((1, "attention_bottleneck"), "bottleneck_down.weight"): (6, 32),
    key((1, "attention_bottleneck"), "bottleneck_up.weight"): (32, 6),
}

SAMPLES: dict[str, tuple[Config, Tensors]] = {
    "lora": _sample(_LORA, _Q0),
    "alora": _sample({**_LORA, "alora_invocation_tokens": [3, 39, 3]}, _Q0),
    "dora": _sample(
        {**_LORA, "use_dora": True, "bias": "lora_only"},
        {
            **_Q0,
            key(Q0, "lora_magnitude_vector"): (32,),
            key(Q0, "base_layer.bias"): (32,),
        },
    ),
    "lora-bias": _sample(
        {**_LORA, "lora_bias": True, "bias": "all"},
        {
            **_Q0,
            key(Q0, "lora_B.bias"): (32,),
            key(Q0, "base_layer.bias"): (32,),
            key((1, "q_proj"), "bias"): (32,),
            **{
                key((layer, name), "bias"): (16,)
                for layer in (0, 1)
                for name in ("k_proj", "v_proj")
            },
        },
    ),
    "lora-embeddings": _sample(
        {**_LORA, "target_modules": ["embed_tokens", "lm_head"]},
        {
            **_factors(HEAD, HIDDEN, VOCAB),
            key(EMBED, "lora_embedding_A"): (2, VOCAB),
            key(EMBED, "lora_embedding_B"): (HIDDEN, 2),
            key(EMBED, "base_layer.weight"): (VOCAB, HIDDEN),
        },
    ),
    "lora-saved": _sample(
        {**_LORA, "modules_to_save": ["lm_head", "q_norm"], "trainable_token_indices": [9, 4]},
        {
            **_Q0,
            key(HEAD, "weight"): (VOCAB, HIDDEN),
            key((0, "q_norm"), "weight"): (8,),
            key((1, "q_norm"), "weight"): (8,),
            key(EMBED, "token_adapter.trainable_tokens_delta"): (2, HIDDEN),
        },
    ),
    "adalora": _sample(
        {
            "peft_type": "ADALORA",
            "init_r": 4,
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ".*",
            "rank_pattern": {
                "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
                "model.layers.1.self_attn.v_proj.lora_E": [False] * 4,
            },
        },
        {
            **_ADALORA_Q0,
            key(V1, "lora_A"): (0, 32),
            key(V1, "lora_B"): (16, 0),
            key(V1, "lora_E"): (0, 1),
        },
    ),
    "ia3": _sample(
        {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        {
            **{key((layer, "k_proj"), "ia3_l"): (16, 1) for layer in (0, 1)},
            **{key((layer, "down_proj"), "ia3_l"): (1, 48) for layer in (0, 1)},
        },
    ),
    "beft": _sample(
        {"peft_type": "BEFT", "target_modules": ["o_proj"]},
        {key((layer, "o_proj"), "beft_bias"): (1, 32) for layer in (0, 1)},
    ),
    "norms": _sample(
        {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "model.norm"]},
        {
            **{key((n, "input_layernorm"), "ln_tuning_layers.weight"): (32,) for n in (0, 1)},
            key((-1, "norm"), "ln_tuning_layers.weight"): (32,),
        },
    ),
    "tokens": _sample(
        {
            "peft_type": "TRAINABLE_TOKENS",
            "token_indices": [39, 0, 7],
            "target_modules": ["embed_tokens"],
        },
        {key(EMBED, "trainable_tokens_delta"): (3, HIDDEN)},
    ),
    "prompt": _sample(
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": HIDDEN},
        {"prompt_embeddings": (3, HIDDEN)},
    ),
    "p-tuning": _sample(
        {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 99},
        {"prompt_embeddings": (3, HIDDEN)},
    ),
    "prefix": _sample(
        {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": 3,
            "num_layers": 2,
            "num_attention_heads": 2,
            "token_dim": KV,
            "prefix_projection": True,
        },
        {"prompt_embeddings": (3, 2 * 2 * KV)},
    ),
    "cpt": _sample(
        {"peft_type": "CPT", "num_virtual_tokens": 3, "cpt_token_ids": [1, 2, 3]},
        {"prompt_embeddings": (3, HIDDEN)},
    ),
    "multitask": _sample(
        {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "num_virtual_tokens": 3,
            "num_tasks": 1,
            "num_ranks": 2,
        },
        {
            "prompt_embeddings": (3, HIDDEN),
            "prefix_task_cols": (1, 3, 2),
            "prefix_task_rows": (1, 2, HIDDEN),
        },
    ),
    "cartridge": _sample(
        {"peft_type": "CARTRIDGE", "num_virtual_tokens": 3, "num_frozen_tokens": 1},
        {"prompt_embeddings": (3, 2 * 2 * KV)},
    ),
    "bottleneck": _sample(
        {
            "peft_type": "BOTTLENECK",
            "bottleneck_size": None,
            "non_linearity": "gelu",
            "placements": ["attention", "mlp"],
            "reads": "output",
            "scaling": 0.5,
        },
        _BOTTLENECK,
    ),
    **folded_files.SAMPLES,
}
"""By name: configuration and tensors."""
