"""More adapters that fold into A and B at load: kinds by the served weight, variants of LoRA."""

from __future__ import annotations

from adapters.peft_files import TIED, Case, Q, amplify, lora
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

Sites = dict[tuple[int, str], str]

PEANUT = "peanut_A.weight peanut_B.weight"
DEEP = " ".join(f"peanut_{part}.{n}.weight" for part in ("encoders", "decoders") for n in (0, 1))
VBLORA = "vblora_logits_A vblora_logits_B base_model.vblora_vector_bank"
BIASED = (Q, "k_proj", "v_proj", "o_proj")
DELORA = "delora_A delora_B delora_lambda delora_w_norm"
DEFT = "deft_P deft_R"
TARGETS = [Q, "k_proj", "down_proj"]


def at(roles: str, *names: str) -> Sites:
    """The same roles at modules of the first layer, or at the head."""
    return {(-1 if name == "lm_head" else 0, name): roles for name in names}


def biases(*names: str, **modules: str) -> Sites:
    """Roles by module; the biased modules `names` have a bias in addition."""
    sites = {(0, name): roles for name, roles in modules.items()}
    return sites | {(0, name): f"{modules.get(name, '')} bias".strip() for name in names}


CASES: dict[str, Case] = {
    "delora": Case(
        "llama",
        "DeloraConfig",
        {"target_modules": [*TARGETS, "lm_head"], "r": 3},
        at(DELORA, *TARGETS, "lm_head"),
    ),
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
            "modules_to_save": ["input_layernorm"],
            "init_weights": False,
        },
        {
            **biases(*BIASED, **dict.fromkeys([*TARGETS, "o_proj"], DELORA)),
            **at("weight", "input_layernorm"),
        },
    ),
    "hra": Case(
        "llama",
        "HRAConfig",
        {"target_modules": [*TARGETS, "lm_head"], "r": 4},
        at("hra_u", *TARGETS, "lm_head"),
    ),
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
        biases(*BIASED, **dict.fromkeys([*BIASED, "gate_proj", "down_proj"], "hra_u")),
    ),
    "deft": Case(
        "llama",
        "DeftConfig",
        {"target_modules": [*TARGETS, "lm_head"], "r": 3, "alpha": 4},
        at(DEFT, *TARGETS, "lm_head"),
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
        biases(*BIASED, **dict.fromkeys(TARGETS, "deft_P")),
    ),
    "deft by qr": Case(
        "qwen2",
        "DeftConfig",
        {"target_modules": TARGETS, "r": 9, "decomposition_method": "qr", "init_weights": False},
        at(DEFT, *TARGETS),
    ),
    "peanut": Case(
        "llama", "PeanutConfig", {"target_modules": TARGETS, "r": 4}, at(PEANUT, *TARGETS)
    ),
    "peanut, deep": Case(
        TIED,
        "PeanutConfig",
        {
            "target_modules": [*TARGETS, "o_proj"],
            "r": 6,
            "depth": 2,
            "act_fn": "gelu",
            "scaling": 0.5,
        },
        at(f"{PEANUT} {DEEP}", *TARGETS, "o_proj"),
    ),
    "vblora": Case(
        "llama",
        "VBLoRAConfig",
        {"target_modules": TARGETS, "r": 3, "num_vectors": 9, "vector_length": 16},
        at(VBLORA, *TARGETS),
        edit=amplify("vector_bank", 3.0),
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
        {
            **biases(Q, "k_proj", **dict.fromkeys(TARGETS, VBLORA)),
            **at(VBLORA, "lm_head"),
        },
    ),
    "pvera": Case(
        "llama",
        "PveraConfig",
        {"target_modules": TARGETS, "r": 6},
        at("pvera_lambda_b pvera_lambda_d pvera_A pvera_B", *TARGETS),
    ),
    "pvera from its seed": Case(
        TIED,
        "PveraConfig",
        {
            "target_modules": TARGETS,
            "r": 5,
            "save_projection": False,
            "projection_prng_key": 3,
            "bias": "pvera_only",
        },
        biases(Q, "k_proj", **dict.fromkeys(TARGETS, "pvera_lambda_b pvera_lambda_d")),
    ),
    "poly": Case(
        "llama",
        "PolyConfig",
        {"target_modules": TARGETS, "r": 3, "n_tasks": 3, "n_skills": 4, "n_splits": 2},
        at("poly_lora_A poly_lora_B poly_router.module_logits", *TARGETS),
        edit=amplify("module_logits", 20.0),
        added={"loraplex_task": 1},
        task=1,
    ),
    "bd-lora": lora(
        "llama",
        at("a b", *TARGETS, "lm_head"),
        r=6,
        target_modules=[*TARGETS, "lm_head"],
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["down_proj", "lm"], target_modules_bd_b=["self_attn"], nblocks=2
        ),
    ),
    "bd-lora of some": lora(
        TIED,
        biases(
            Q,
            *("k_proj", "o_proj"),
            **{Q: "a b", **dict.fromkeys(("k_proj", "o_proj", "down_proj"), "a b b_bias")},
        ),
        r=4,
        use_rslora=True,
        lora_bias=True,
        bias="lora_only",
        rank_pattern={"k_proj": 8},
        target_modules=[*TARGETS, "o_proj"],
        use_bdlora=BdLoraConfig(target_modules_bd_b=["q_"], nblocks=4, match_strict=False),
    ),
    "kasa": lora(
        "llama", at("a b lora_diag", *TARGETS), target_modules=TARGETS, kasa_config=KasaConfig()
    ),
    "kasa with biases": lora(
        TIED,
        biases(*BIASED, **dict.fromkeys([*TARGETS, "up_proj"], "a b b_bias lora_diag")),
        r=5,
        lora_alpha=-3,
        lora_bias=True,
        bias="all",
        target_modules=[*TARGETS, "up_proj"],
        rank_pattern={"k_proj": 9},
        kasa_config=KasaConfig(),
    ),
    "mica": lora("llama", at("a b", *TARGETS), init_lora_weights="mica", target_modules=TARGETS),
    "velora": lora("llama", at("a b", Q), velora_config=VeloraConfig(num_groups=2)),
    "monteclora": lora("llama", at("a b", Q), monteclora_config=MontecloraConfig(num_samples=3)),
}
