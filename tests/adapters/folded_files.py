"""Small valid adapters of the kinds that fold into A and B, for `adapter_files.BASE`."""

from __future__ import annotations

from typing import Any

import numpy as np
from adapters.adapter_files import Tensors, llama_path
from loraplex_adapters.format.modules import PREFIX

from adapters import served_files

Config = dict[str, Any]

Q0, K0, HEAD = (0, "q_proj"), (0, "k_proj"), (-1, "lm_head")  # 32 x 32, 16 x 32, 40 x 32
RANDLORA_A, RANDLORA_B = "base_model.randlora_A", "base_model.randlora_B"
VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"


def key(site: tuple[int, str], ending: str) -> str:
    """PEFT's name of a tensor."""
    return f"{PREFIX}{llama_path(*site)}.{ending}"


def _sample(config: Config, shapes: dict[str, tuple[int, ...]]) -> tuple[Config, Tensors]:
    rng = np.random.default_rng(0)
    common = {"inference_mode": True, "peft_version": "0.21.2", "task_type": "CAUSAL_LM"}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for role in ("randlora_A", "randlora_B"):  # PEFT repeats what modules share
        if f"base_model.{role}" in tensors:
            tensors[key(K0, role)] = tensors[f"base_model.{role}"]
    return {**common, "target_modules": r"model\.layers\.0\..*q_proj", **config}, tensors


def _at(site: tuple[int, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key(site, ending): shape for ending, shape in shapes.items()}


_K0_TARGET = r"model\.layers\.0\..*k_proj"
_VERA = {"peft_type": "VERA", "r": 4, "target_modules": r"model\.layers\.0\..*[qk]_proj"}
_VECTORS = {
    **_at(Q0, {"vera_lambda_b": (32,), "vera_lambda_d": (4,)}),
    **_at(K0, {"vera_lambda_b": (16,), "vera_lambda_d": (4,)}),
}

SAMPLES: dict[str, tuple[Config, Tensors]] = {
    "loha": _sample(
        {"peft_type": "LOHA", "r": 3, "alpha": 6},
        _at(
            Q0,
            {
                "hada_w1_a": (32, 3),
                "hada_w1_b": (3, 32),
                "hada_w2_a": (32, 3),
                "hada_w2_b": (3, 32),
            },
        ),
    ),
    "lokr": _sample(
        {"peft_type": "LOKR", "r": 2, "alpha": 6},
        _at(Q0, {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}),
    ),
    "miss": _sample(
        {"peft_type": "MISS", "r": 5, "bias": "MiSS_only"},
        _at(Q0, {"miss_block": (5, 32), "base_layer.bias": (32,)}),
    ),
    "miss-mini": _sample(
        {"peft_type": "MISS", "r": 8, "init_weights": "mini", "mini_r": 2},
        _at(Q0, {"miss_block": (8, 2)}),
    ),
    "gralora": _sample(
        {"peft_type": "GRALORA", "r": 4, "alpha": 7, "gralora_k": 2, "hybrid_r": 3},
        _at(
            Q0,
            {
                "gralora_A": (2, 16, 4),
                "gralora_B": (2, 4, 16),
                "gralora_A_general.weight": (3, 32),
                "gralora_B_general.weight": (32, 3),
            },
        ),
    ),
    "randlora": _sample(
        {"peft_type": "RANDLORA", "r": 5, "randlora_alpha": 10, "target_modules": _K0_TARGET},
        {
            **_at(K0, {"randlora_lambda": (5, 4), "randlora_gamma": (4, 16)}),
            RANDLORA_A: (5, 1, 16),
            RANDLORA_B: (32, 4, 5),
        },
    ),
    "vera": _sample(_VERA, {**_VECTORS, VERA_A: (4, 32), VERA_B: (32, 4)}),
    "vera-seed": _sample({**_VERA, "save_projection": False, "projection_prng_key": 3}, _VECTORS),
    **served_files.SAMPLES,
}
"""By name: configuration and tensors."""

PACKED = {
    "loha": 2 * 9 * 128,
    "lokr": 2 * 8 * 128,
    "miss": 2 * 5 * 128 + 128,
    "miss-mini": 2 * 2 * 128,
    "gralora": 2 * 11 * 128,
    "randlora": 16 * 128 + 16 * 64,
    "vera": 2 * 4 * 128 + 4 * 128 + 4 * 64,
    "vera-seed": 2 * 4 * 128 + 4 * 128 + 4 * 64,
    **served_files.PACKED,
}
"""Packed sizes of the samples in float32: the folded rank times both widths."""
