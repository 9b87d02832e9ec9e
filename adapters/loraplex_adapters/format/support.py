"""Support of configuration options: served, without effect, or refused.

Each kind in `format.kinds` has a table of options. Configurations are read by these tables, and the
support matrix in docs/adapters.md is generated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Support(Enum):
    """Treatment of a key of adapter_config.json."""

    SERVED = "served"
    """The key is read; it acts, or is compared with the tensors."""
    IGNORED = "no effect"
    """No value of the key affects the forward pass."""
    REFUSED = "refused"
    """The key would change the forward pass; it is accepted only if it is switched off."""


@dataclass(frozen=True, slots=True)
class Option:
    """Treatment of a key of a configuration, with a short note on how or why."""

    support: Support
    note: str = ""


def served(note: str = "") -> Option:
    """An option that acts as in PEFT."""
    return Option(Support.SERVED, note)


def ignored(note: str = "") -> Option:
    """An option that has no effect in serving."""
    return Option(Support.IGNORED, note)


def refused(note: str) -> Option:
    """An option that is not supported; `note` names the feature that it turns on."""
    return Option(Support.REFUSED, note)


STAMP = "loraplex_"
"""Prefix of keys that are a trainer's stamps; they become the adapter's provenance."""

COMMON: Mapping[str, Option] = {
    "auto_mapping": ignored("names a class to load the base with; nothing here loads it"),
    "base_model_name_or_path": served("shown, not compared"),
    "inference_mode": ignored(),
    "peft_type": served(),
    "peft_version": served("shown"),
    "revision": served("shown"),
    "task_type": served("CAUSAL_LM"),
}
"""Options of every kind."""

OTHERS: Mapping[str, Option] = {
    "_name_or_path": ignored("a name of the base"),
    "architectures": ignored("names the base's class"),
    "dtype": ignored("the tensors state theirs"),
    "enable_lora": refused("LoRA of parts of a fused matrix"),
    "lora_dtype": ignored("the tensors state theirs"),
    "lorap_emb_lr": ignored("a learning rate"),
    "lorap_lr_ratio": ignored("a learning rate"),
    "loraplus_lr_embedding": ignored("a learning rate"),
    "loraplus_lr_ratio": ignored("a learning rate"),
    "merge_weights": ignored("says when old versions of PEFT merge"),
    "model_type": ignored("names the base's family"),
    "runtime_config": ignored("says where PEFT computes"),
    "torch_dtype": ignored("the tensors state theirs"),
    "transformers_version": ignored(),
    "unsloth_fixed": ignored("a mark of the trainer"),
    "unsloth_version": ignored("a mark of the trainer"),
    "use_cache": ignored("a setting of generation in training"),
    "use_merged_linear": refused("LoRA of parts of a fused matrix"),
}
"""Options of every kind that PEFT 0.21 does not write, but older versions or other trainers do."""


def is_neutral(key: str, value: object) -> bool:
    """Whether an option is switched off: null, false, empty, or "none" for `bias`."""
    if value is None or value is False:
        return True
    if key == "bias" and value == "none":
        return True
    return isinstance(value, str | list | dict) and not value


UNSERVED: Mapping[str, str] = {
    "ADAMSS": "low-rank changes of clusters of rows, which PEFT finds again from the base",
    "ADAPTION_PROMPT": "prompts with a gate in every attention, which change no weight",
    "BOFT": "butterfly rotations of a module's input, whose change has full rank",
    "C3A": "circulant blocks, whose change has full rank",
    "FOURIERFT": "a sum of waves, whose rank is up to twice their number",
    "FROD": "a whole weight, written in another basis",
    "GLORA": "products with the base's weights, element by element, which have full rank",
    "HIRA": "products with the base's weights, element by element, which have full rank",
    "LILY": "a mixture that depends on the other tokens of a batch",
    "OFT": "rotations of a module's input, whose change has full rank",
    "OSF": "new weights in all but the base's strongest directions",
    "PSOFT": "rotations of the base's singular vectors, whose signs depend on a library",
    "ROAD": "rotations of pairs of outputs, whose change has full rank",
    "SHADOW": "a second network in parallel to the base",
    "SHIRA": "changes of single weights, which have full rank in general",
    "SUPERTUNING": "changes of single weights, which have full rank in general",
    "TINYLORA": "vectors that belong to modules by an order that is not in the file",
    "UNILORA": "indices that belong to modules by an order that is not in the file",
    "WAVEFT": "a sum of wavelets, whose rank is up to their number",
    "XLORA": "a mixture that a network chooses for each token",
}
"""PEFT's types that are not supported: what each is, and why it does not fold into A and B."""
