"""Adapters of the kinds that fold into A and B at load, as PEFT writes them."""

from __future__ import annotations

from typing import Any

from adapters.peft_files import HEAD, TIED, Case, Q

from adapters import served_cases

FIRST, K, DOWN, UP = (0, Q), (0, "k_proj"), (0, "down_proj"), (0, "up_proj")
LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
LOKR = "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b"
GRALORA = "gralora_A gralora_B"
HYBRID = f"{GRALORA} gralora_A_general gralora_B_general"
RANDLORA = "randlora_A randlora_B randlora_gamma randlora_lambda"
SEEDED = "vera_lambda_b vera_lambda_d"
VERA = f"vera_A vera_B {SEEDED}"
ALL = (Q, "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def everywhere(roles: str) -> dict[tuple[int, str], str]:
    """The same roles at every projection of the first layer."""
    return {(0, name): roles for name in ALL}


def _case(
    kind: str, variant: str, sites: dict[tuple[int, str], str], *targets: str, **options: Any
) -> Case:
    return Case(variant, kind, {"target_modules": list(targets), **options}, sites)


CASES: dict[str, Case] = {
    "loha": _case(
        "LoHaConfig",
        "llama",
        {FIRST: LOHA, HEAD: LOHA, DOWN: LOHA},
        *(Q, "lm_head", "down_proj"),
        r=3,
        alpha=60,
    ),
    "loha by patterns": Case(
        "qwen2",
        "LoHaConfig",
        {
            "target_modules": "all-linear",
            "r": 4,
            "alpha": 30,
            "rank_pattern": {"k_proj": 12, r".*\.[12]\.mlp\.up_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 9, "down_proj": 60},
        },
        everywhere(LOHA),
    ),
    "lokr": _case(
        "LoKrConfig",
        "llama",
        {FIRST: LOKR, HEAD: LOKR, DOWN: LOKR},
        *(Q, "lm_head", "down_proj"),
        r=1,
        alpha=20,
        decompose_both=True,
        decompose_factor=4,
    ),
    "lokr of whole matrices": _case(
        "LoKrConfig",
        "llama",
        {FIRST: "lokr_w1 lokr_w2", K: "lokr_w1 lokr_w2_a lokr_w2_b", UP: "lokr_w1 lokr_w2"},
        *(Q, "k_proj", "up_proj"),
        r=16,
        alpha=60,
        rank_pattern={"k_proj": 3},
        init_weights="lycoris",
    ),
    "miss": _case(
        "MissConfig", "llama", {FIRST: "miss_block", HEAD: "miss_block"}, Q, "lm_head", r=5
    ),
    "miss, few columns": _case(
        "MissConfig",
        TIED,
        {
            FIRST: "miss_block bias",
            DOWN: "miss_block",
            K: "bias",
            (0, "v_proj"): "bias",
            (0, "o_proj"): "bias",
        },
        *(Q, "down_proj"),
        r=8,
        mini_r=4,
        init_weights="mini",
        bias="all",
    ),
    "gralora": _case(
        "GraloraConfig",
        "llama",
        {FIRST: GRALORA, HEAD: GRALORA, DOWN: GRALORA},
        *(Q, "lm_head", "down_proj"),
        r=4,
        alpha=12,
    ),
    "gralora, hybrid": _case(
        "GraloraConfig",
        TIED,
        {FIRST: f"{HYBRID} bias", K: f"{HYBRID} bias"},
        *(Q, "k_proj"),
        r=24,
        gralora_k=4,
        hybrid_r=3,
        bias="gralora_only",
    ),
    "randlora": Case(
        "llama",
        "RandLoraConfig",
        {"target_modules": "all-linear", "r": 6, "randlora_alpha": 1},
        everywhere(RANDLORA),
    ),
    "vera": _case(
        "VeraConfig",
        "llama",
        {FIRST: VERA, K: VERA, DOWN: VERA, HEAD: VERA},
        *(Q, "k_proj", "down_proj", "lm_head"),
        r=8,
    ),
    "vera from its seed": _case(
        "VeraConfig",
        "qwen2",
        {FIRST: f"{SEEDED} bias", (0, "o_proj"): SEEDED, UP: SEEDED},
        *(Q, "o_proj", "up_proj"),
        r=8,
        save_projection=False,
        projection_prng_key=7,
        bias="vera_only",
    ),
    **served_cases.CASES,
}
"""What is served. PEFT cannot load all of them over `Linear4bit`."""
