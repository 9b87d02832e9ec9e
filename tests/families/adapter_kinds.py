"""Adapters of every kind for the families: PEFT's configurations, and files that PEFT writes.

`PAIRS` is the covering set: every kind of adapter meets every feature of a family, in as few models
as possible.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from families import variants
from loraplex_adapters.format.modules import ModulePaths, base_sites
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.info import BaseInfo
from transformers import PreTrainedModel

Options = Callable[[BaseInfo], Mapping[str, Any]]

BLEND = {"first": 0.7, "second": -0.4}
"""Weights of the two adapters of a blend."""


def info(variant: str) -> BaseInfo:
    """A variant as adapters are checked against it."""
    kind, changes = variants.VARIANTS[variant]
    config = variants.CONFIG_MAPPING[kind](**{**variants._SHAPE, **changes})
    config.architectures = [type(variants.build(variant)).__name__]
    return BaseInfo(decoder_config(config.to_dict()), "", "float32")


def names(base: BaseInfo, *, norms: bool = False, layer: int = 0) -> list[str]:
    """Names of the matrices of a layer, or of the norms, as the model has them."""
    path, shapes = ModulePaths(base), base.config.module_shapes()
    sites = [site for site in base_sites(base) if site[0] == layer]
    found = [path(site) for site in sites if (site[1] in shapes) != norms]
    return [name.rpartition(".")[2] for name in found]


def _linear(**options: Any) -> Options:
    return lambda base: {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}


def _expression(base: BaseInfo) -> Mapping[str, Any]:
    first, *_, last = names(base)
    return {
        "target_modules": rf".*layers\.(0|2)\..*\.({first}|{last})",
        "exclude_modules": rf".*\.0\..*{last}",
        "rank_pattern": {rf"layers\.2\..*{last}": 7},
        "alpha_pattern": {first: 5},
        "r": 3,
    }


def _ia3(base: BaseInfo) -> Mapping[str, Any]:
    first, *middle, last = names(base)
    return {"target_modules": [first, middle[-1], last], "feedforward_modules": [last]}


def _saved(base: BaseInfo) -> Mapping[str, Any]:
    head = [] if base.config.tie_embeddings else ["lm_head"]
    saved = ["embed_tokens", "model.norm", *head]
    return {"r": 2, "target_modules": names(base)[:1], "modules_to_save": saved}


def _tokens(base: BaseInfo) -> Mapping[str, Any]:
    tied = base.config.tie_embeddings
    return {
        "r": 2,
        "target_modules": names(base)[-1:],
        "trainable_token_indices": {"embed_tokens": [5, 3], **({} if tied else {"lm_head": [7]})},
    }


def _embeddings(base: BaseInfo) -> Mapping[str, Any]:
    return {"r": 3, "target_modules": ["embed_tokens", *names(base)[:1]]}


KINDS: dict[str, tuple[str, Options]] = {
    "LoRA": ("LoraConfig", _linear()),
    "LoRA by expressions": ("LoraConfig", _expression),
    "LoRA with all biases": ("LoraConfig", _linear(bias="all", use_rslora=True)),
    "LoRA of embeddings": ("LoraConfig", _embeddings),
    "DoRA": ("LoraConfig", _linear(use_dora=True)),
    "AdaLoRA": (
        "AdaLoraConfig",
        lambda base: {"target_modules": names(base), "init_r": 4, "total_step": 10},
    ),
    "IA3": ("IA3Config", _ia3),
    "BEFT": ("BeftConfig", lambda base: {"target_modules": names(base)}),
    "norms": (
        "LNTuningConfig",
        lambda base: {"target_modules": [*names(base, norms=True), "model.norm"]},
    ),
    "saved modules": ("LoraConfig", _saved),
    "trained tokens": ("LoraConfig", _tokens),
    "prompt": ("PromptTuningConfig", lambda base: {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", lambda base: {"num_virtual_tokens": 3}),
}
"""PEFT's configuration class and its options, by kind."""


def write(
    kind: str, base: BaseInfo, model: PreTrainedModel, directory: Path, seed: int = 0
) -> Path:
    """Creates an adapter for a copy of the model with PEFT, and saves it, full of noise."""
    name, options = KINDS[kind]
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = getattr(peft, name)(task_type="CAUSAL_LM", **options(base))
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(adapted.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        adapted.create_or_update_model_card = lambda _: None  # takes longer than all the rest
        adapted.save_pretrained(directory)
    return directory


def attached(model: PreTrainedModel, directory: Path) -> Any:
    """A copy of the model with the adapter, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
