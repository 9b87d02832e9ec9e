"""Which of PEFT's LoRA options are served: the tables that the reader of configurations goes by."""

from __future__ import annotations

from collections.abc import Mapping

MEANINGFUL = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Keys that `config` reads."""

INFORMATIONAL = frozenset(
    {
        "auto_mapping",  # names a class to load the base with; nothing here loads it
        "eva_config",  # settings of an initialisation that leaves the base as it was
        "inference_mode",
        "lora_dropout",  # acts in training only
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
    }
)
"""Keys that say nothing about the forward pass, whatever their value."""

UNSUPPORTED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "bias": "trained biases",
    "corda_config": "CorDA, whose initialisation changes the base",
    "ensure_weight_tying": "tied embeddings among the targets",
    "fan_in_fan_out": "transposed base layers, which no served base has",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "loftq_config": "LoftQ, whose initialisation changes the base",
    "lora_bias": "a bias beside lora_B",
    "lora_ga_config": "LoRA-GA, whose initialisation changes the base",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "targets that are parameters instead of modules",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
"""Keys that change the forward pass in ways that are not served. They pass when `is_neutral`."""

PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal"})
"""Initialisations by name that leave the base as it was, so that A and B are the whole delta."""

_CONVERT = (
    "convert the adapter when saving it: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)
_RETRAIN = "train it on the served base with another initialisation"


def way_out(initialisation: str) -> str:
    """What the owner of an adapter with a base-changing initialisation can do."""
    convertible = initialisation.startswith(("pissa", "corda", "olora", "lora_ga"))
    return _CONVERT if convertible else _RETRAIN


def is_neutral(key: str, value: object) -> bool:
    """Whether an option is switched off: null, false, empty, or "none" for `bias`."""
    if value is None or value is False:
        return True
    if key == "bias" and value == "none":
        return True
    return isinstance(value, str | list | dict) and not value
