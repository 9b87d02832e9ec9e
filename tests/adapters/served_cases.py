"""More adapters that fold into A and B at load: kinds by the served weight, variants of LoRA."""

from __future__ import annotations

from adapters.peft_files import HEAD, TIED, Case, Q, amplify, lora
from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

FIRST, DOWN = (0, Q), (0, "down_proj")
DELORA = "delora_A delora_B delora_lambda delora_w_norm"
DEFT = "deft_P deft_R"
TARGETS = [Q, "k_proj", "down_proj"]


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
            "modules_to_save": ["input_layernorm"],
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
        {"target_modules": TARGETS, "r": 9, "decomposition_method": "qr", "init_weights": False},
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
        {},
    ),
    "bd-lora": lora(
        "llama",
        {FIRST: "a b", DOWN: "a b", HEAD: "a b"},
        r=6,
        target_modules=[*TARGETS, "lm_head"],
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["down_proj", "lm"], target_modules_bd_b=["self_attn"], nblocks=2
        ),
    ),
    "bd-lora of some": lora(
        TIED,
        {},
        r=4,
        use_rslora=True,
        lora_bias=True,
        bias="lora_only",
        rank_pattern={"k_proj": 8},
        target_modules=[*TARGETS, "o_proj"],
        use_bdlora=BdLoraConfig(target_modules_bd_b=["q_"], nblocks=4, match_strict=False),
    ),
    "kasa": lora(
        "llama", {FIRST: "a b lora_diag"}, target_modules=TARGETS, kasa_config=KasaConfig()
    ),
    "kasa with biases": lora(
        TIED,
        {},
        r=5,
        lora_alpha=-3,
        lora_bias=True,
        bias="all",
        target_modules=[*TARGETS, "up_proj"],
        rank_pattern={"k_proj": 9},
        kasa_config=KasaConfig(),
    ),
    "mica": lora("llama", {FIRST: "a b"}, init_lora_weights="mica", target_modules=TARGETS),
    "velora": lora("llama", {FIRST: "a b"}, velora_config=VeloraConfig(num_groups=2)),
    "monteclora": lora("llama", {FIRST: "a b"}, monteclora_config=MontecloraConfig(num_samples=3)),
}
