"""More small valid adapters that fold into A and B, for `adapter_files.BASE`."""

from __future__ import annotations

from typing import Any

import numpy as np
from adapters.adapter_files import Tensors, llama_path
from loraplex_adapters.format.modules import PREFIX

Config = dict[str, Any]

Q0, K0, HEAD = (0, "q_proj"), (0, "k_proj"), (-1, "lm_head")  # 32 x 32, 16 x 32, 40 x 32
BANK = "base_model.vblora_vector_bank"
SAMPLER = "lora_monteclora_sampler"


def key(site: tuple[int, str], ending: str) -> str:
    """PEFT's name of a tensor."""
    return f"{PREFIX}{llama_path(*site)}.{ending}"


def _sample(
    config: Config, *sites: tuple[tuple[int, str], dict[str, tuple[int, ...]]], **whole: Any
) -> tuple[Config, Tensors]:
    rng = np.random.default_rng(0)
    shapes = {key(site, end): shape for site, ends in sites for end, shape in ends.items()}
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {**shapes, **whole.get("whole", {})}.items()
    }
    common = {"inference_mode": True, "peft_version": "0.21.2", "task_type": "CAUSAL_LM"}
    return {**common, "target_modules": r"model\.layers\.0\..*[qk]_proj", **config}, tensors


def _of(site: tuple[int, str], **shapes: tuple[int, ...]) -> Any:
    """Tensors of a site; `__` in a name stands for a dot."""
    return site, {name.replace("__", "."): shape for name, shape in shapes.items()}


_Q, _K = r"model\.layers\.0\..*q_proj", r"model\.layers\.0\..*k_proj"
_LORA: Config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": _Q}
_AB = {"lora_A__weight": (4, 32), "lora_B__weight": (32, 4)}
_BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["k_"], "target_modules_bd_b": ["q_proj"]}

SAMPLES: dict[str, tuple[Config, Tensors]] = {
    "delora": _sample(
        {"peft_type": "DELORA", "r": 3, "rank_pattern": {"k_proj": 2}, "bias": "delora_only"},
        _of(
            Q0,
            delora_A=(3, 32),
            delora_B=(32, 3),
            delora_lambda=(1,),
            delora_w_norm=(32,),
            base_layer__bias=(32,),
        ),
        _of(
            K0,
            delora_A=(2, 32),
            delora_B=(16, 2),
            delora_lambda=(1,),
            delora_w_norm=(32,),
            base_layer__bias=(16,),
        ),
    ),
    "hra": _sample(
        {"peft_type": "HRA", "r": 4, "apply_GS": True},
        _of(Q0, hra_u=(32, 4)),
        _of(K0, hra_u=(32, 4)),
    ),
    "deft": _sample(
        {"peft_type": "DEFT", "r": 20, "alpha": 3, "decomposition_method": "qr"},
        _of(Q0, deft_P=(32, 20), deft_R=(20, 32)),
        _of(K0, deft_P=(16, 16), deft_R=(16, 32)),
    ),
    "para": _sample(
        {"peft_type": "DEFT", "r": 2, "para": True, "target_modules": _K}, _of(K0, deft_P=(16, 2))
    ),
    "peanut": _sample(
        {"peft_type": "PEANUT", "r": 3, "depth": 1, "act_fn": "tanh", "target_modules": _K},
        _of(
            K0,
            peanut_A__weight=(3, 16),
            peanut_B__weight=(16, 3),
            peanut_encoders__0__weight=(3, 3),
            peanut_decoders__0__weight=(3, 3),
        ),
    ),
    "vblora": _sample(
        {"peft_type": "VBLORA", "r": 2, "num_vectors": 5, "vector_length": 8, "topk": 2}
        | {"target_modules": _K},
        _of(K0, vblora_logits_A=(2, 4, 5), vblora_logits_B=(2, 2, 5)),
        whole={BANK: (5, 8)},
    ),
    "pvera": _sample(
        {"peft_type": "PVERA", "r": 3, "target_modules": _K, "sample_at_inference": False},
        _of(K0, pvera_lambda_b=(16,), pvera_lambda_d=(6,)),
        whole={"base_model.pvera_A": (6, 32), "base_model.pvera_B": (16, 3)},
    ),
    "poly": _sample(
        {"peft_type": "POLY", "r": 3, "n_tasks": 1, "n_skills": 5, "n_splits": 2}
        | {"target_modules": _K},
        _of(
            K0,
            poly_lora_A=(2, 5, 16, 3),
            poly_lora_B=(2, 5, 3, 8),
            poly_router__module_logits=(1, 10),
        ),
    ),
    "bd-lora": _sample(
        {**_LORA, "use_bdlora": _BLOCKS, "target_modules": r"model\.layers\.0\..*[qk]_proj"},
        _of(Q0, lora_A__weight=(4, 32), lora_B__weight=(32, 2)),
        _of(K0, lora_A__weight=(4, 16), lora_B__weight=(16, 4)),
    ),
    "kasa": _sample(
        {**_LORA, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}, "bias": "lora_only"},
        _of(Q0, **_AB, lora_diag=(4,), base_layer__bias=(32,)),
    ),
    "qa-lora": _sample(
        {**_LORA, "use_qalora": True, "qalora_group_size": 8},
        _of(Q0, lora_A__weight=(4, 4), lora_B__weight=(32, 4)),
    ),
    "mica": _sample({**_LORA, "init_lora_weights": "mica"}, _of(Q0, **_AB)),
    "velora": _sample(
        {**_LORA, "velora_config": {"num_groups": 2}}, _of(Q0, **_AB, lora_velora_embed=(16,))
    ),
    "monteclora": _sample(
        {**_LORA, "monteclora_config": {"num_samples": 2}},
        _of(
            Q0,
            **_AB,
            lora_monteclora_sampler__expert_weights=(2,),
            lora_monteclora_sampler__expert_weights_prior=(2,),
            lora_monteclora_sampler__gaussian_var_prior=(4, 4),
            lora_monteclora_sampler__std_prior=(4,),
        ),
    ),
}
"""By name: configuration and tensors."""

PACKED = {
    "delora": 2 * 3 * 128 + 128 + 2 * 128 + 2 * 64 + 64,
    "hra": 2 * 4 * 128 + 4 * 128 + 4 * 64,
    "deft": 2 * 20 * 128 + 16 * 128 + 16 * 64,
    "para": 2 * 128 + 2 * 64,
    "peanut": 3 * 128 + 3 * 64,
    "vblora": 2 * 128 + 2 * 64,
    "pvera": 3 * 128 + 192,
    "poly": 3 * 128 + 192,
    "bd-lora": 2 * 4 * 128 + 4 * 128 + 4 * 64,
    "kasa": 2 * 8 * 128 + 128,
    "qa-lora": 2 * 4 * 128,
    "mica": 2 * 4 * 128,
    "velora": 2 * 4 * 128,
    "monteclora": 2 * 4 * 128,
}
"""Packed sizes of the samples in float32: the folded rank times both widths, and biases."""
