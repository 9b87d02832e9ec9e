"""Adapters of every kind for the families: PEFT's configurations, files, and expected logits.

`pairs` is the covering set: every kind meets every feature in which a family differs from Llama, in
as few models as possible, and every variant meets a kind.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from families import variants
from loraplex_adapters.format.modules import PREFIX, ModulePaths, base_sites
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.info import BaseInfo
from peft.tuners.lora import KasaConfig
from safetensors.torch import save_file
from torch.nn import functional as f
from transformers import PreTrainedModel

Options = Callable[[BaseInfo], Mapping[str, Any]]

POSITIONS = frozenset(
    {"layer_ropes", "long_rope", "more_ropes", "query_scale", "rope_interleaved", "short_positions"}
)
"""Features that concern positions only: they are paired with the kinds that take positions."""

AT_POSITIONS = ("LoRA", "prompt", "prefix")
OF_NAMES = ("LoRA by expressions", "rsLoRA of some layers", "HRA")
"""Kinds that are paired with the features of modules and their names only: what they add is LoRA's.
VeRA and HRA stand for the kinds that fold into A and B."""

_NAMING = ("joined", "gated", "output_norms")
_STATED = ("qkv_bias", "o_bias", "qk_norm", "tie_embeddings")

built = cache(variants.build)
"""The model of a variant, which tests must not change."""


def features(config: DecoderConfig) -> frozenset[str]:
    """The features of a base that not all have, such as "norm layer" or "qkv_bias"."""
    found = {name for name in _STATED if getattr(config, name)}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.default is not MISSING and value != each.default:
            is_choice = isinstance(value, str) or each.name == "joined"
            found.add(f"{each.name} {value}" if is_choice else each.name)
    return frozenset(found)


@cache
def features_of(variant: str) -> frozenset[str]:
    """The features of a variant."""
    model = built(variant)
    stated = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return features(decoder_config(stated))


def served() -> frozenset[str]:
    """The variants that are paired: all but mixtures of experts."""
    return frozenset(v for v in variants.VARIANTS if "num_experts" not in features_of(v))


def concerning(kind: str) -> frozenset[str]:
    """The features that a kind must meet."""
    found = frozenset().union(*map(features_of, served()))
    if kind in OF_NAMES:
        return frozenset(feature for feature in found if feature.startswith(_NAMING))
    return found if kind in AT_POSITIONS else found - POSITIONS


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    """The covering set, `(variant, kind)`, by a greedy choice; in the order of the variants."""
    order = [variant for variant in variants.VARIANTS if variant in served()]
    found: list[tuple[str, str]] = []
    for turn, kind in enumerate(KINDS):
        left = concerning(kind)
        rotated = order[turn % len(order) :] + order[: turn % len(order)]
        while left:
            best = max(rotated, key=lambda variant: len(features_of(variant) & left))
            found.append((best, kind))
            left -= features_of(best)
    unused = [variant for variant in order if variant not in dict(found)]
    found += [(variant, [*KINDS][turn % len(KINDS)]) for turn, variant in enumerate(unused)]
    return tuple(sorted(found, key=lambda pair: order.index(pair[0])))


def names(base: BaseInfo, *, norms: bool = False) -> list[str]:
    """Names of the matrices of a layer, or of its norms, as the model has them."""
    path, shapes = ModulePaths(base), base.config.module_shapes()
    sites = [site for site in base_sites(base) if site[0] == 0]
    found = [path(site) for site in sites if (site[1] in shapes) != norms]
    return [name.rpartition(".")[2] for name in found]


def _linear(**options: Any) -> Options:
    return lambda base: {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}


def _expressions(base: BaseInfo) -> Mapping[str, Any]:
    first, *_, last = names(base)
    return {
        "r": 3,
        "target_modules": rf".*layers\.(0|2)\..*\.({first}|{last})",
        "exclude_modules": rf".*\.0\..*{last}",
        "rank_pattern": {rf"layers\.2\..*{last}": 7},
        "alpha_pattern": {first: 5},
    }


def _layers(base: BaseInfo) -> Mapping[str, Any]:
    *_, up, down = names(base)
    return {
        "r": 5,
        "use_rslora": True,
        "target_modules": [up, down],
        "layers_to_transform": [1, 3],
        "layers_pattern": "layers",
        "exclude_modules": [f"layers.3.mlp.{down}"],
    }


def _ia3(base: BaseInfo) -> Mapping[str, Any]:
    first, *middle, last = names(base)
    return {"target_modules": [first, middle[-1], last], "feedforward_modules": [last]}


def _saved(base: BaseInfo) -> Mapping[str, Any]:
    head = [] if base.config.tie_embeddings else ["lm_head"]
    saved = ["embed_tokens", "model.norm", *head, *names(base, norms=True)[:1]]
    return {"r": 2, "target_modules": names(base)[:1], "modules_to_save": saved}


def _tokens(base: BaseInfo) -> Mapping[str, Any]:
    head = {} if base.config.tie_embeddings else {"lm_head": [7]}
    return {
        "r": 2,
        "target_modules": names(base)[-1:],
        "trainable_token_indices": {"embed_tokens": [5, 3], **head},
    }


KINDS: dict[str, tuple[str, Options]] = {
    "LoRA": ("LoraConfig", _linear()),
    "LoRA by expressions": ("LoraConfig", _expressions),
    "rsLoRA of some layers": ("LoraConfig", _layers),
    "LoRA with all biases": ("LoraConfig", _linear(bias="all")),
    "LoRA of embeddings": (
        "LoraConfig",
        lambda base: {"r": 3, "target_modules": ["embed_tokens", *names(base)[:1]]},
    ),
    "DoRA": ("LoraConfig", _linear(use_dora=True)),
    "AdaLoRA": (
        "AdaLoraConfig",
        lambda base: {"target_modules": names(base), "init_r": 4, "total_step": 10},
    ),
    "IA3": ("IA3Config", _ia3),
    "VeRA": (
        "VeraConfig",
        lambda base: {"target_modules": names(base), "r": 6, "d_initial": 1.0, "bias": "all"},
    ),
    "HRA": (
        "HRAConfig",
        lambda base: {"target_modules": names(base), "r": 3, "init_weights": False, "bias": "all"},
    ),
    "KaSA": ("LoraConfig", _linear(kasa_config=KasaConfig(), lora_bias=True)),
    "BEFT": ("BeftConfig", lambda base: {"target_modules": names(base)}),
    "norms": (
        "LNTuningConfig",
        lambda base: {"target_modules": [*names(base, norms=True), "model.norm"]},
    ),
    "saved modules": ("LoraConfig", _saved),
    "trained tokens": ("LoraConfig", _tokens),
    "prompt": ("PromptTuningConfig", lambda base: {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", lambda base: {"num_virtual_tokens": 3}),
    "bottleneck": ("", lambda base: {}),
}
"""PEFT's configuration class and its options, by kind. PEFT has no bottlenecks: their files are
written by the documented format, and hooks compute them."""

MERGED = ("DoRA", "IA3", "BEFT")
"""Kinds that are merged in memory too."""

EXPORTED = ("LoRA with all biases", "saved modules")
"""Kinds that are merged into checkpoints too."""


def adapted(
    kind: str, base: BaseInfo, model: PreTrainedModel, directory: Path, *, seed: int = 0
) -> Any:
    """Saves an adapter full of noise, and returns a copy of the model that has it."""
    name, options = KINDS[kind]
    if not name:
        return _with_bottlenecks(base, copy.deepcopy(model), directory)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT's own initial values
        config = getattr(peft, name)(task_type="CAUSAL_LM", **options(base))
        found = peft.get_peft_model(copy.deepcopy(model), config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(found.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        found.create_or_update_model_card = lambda _: None  # takes longer than all the rest
        found.save_pretrained(directory)
    return found.eval()


def _with_bottlenecks(base: BaseInfo, model: Any, directory: Path) -> Any:
    """The attention's reads the block's normed input, the MLP's too; both have biases."""
    random, width, hidden = torch.Generator().manual_seed(5), 6, base.config.hidden_size
    shapes = {"down.weight": (width, hidden), "down.bias": (width,)}
    shapes |= {"up.weight": (hidden, width), "up.bias": (hidden,)}
    tensors = {}
    for layer in range(base.config.num_layers):
        for block, site in (("self_attn", "attention"), ("mlp", "mlp")):
            at = f"model.layers.{layer}.{block}"
            own = {key: 0.15 * torch.randn(s, generator=random) for key, s in shapes.items()}
            tensors |= {f"{PREFIX}{at}.bottleneck_{key}": own[key] for key in own}
            output = f"{site}_output_norm"
            end = ModulePaths(base)((layer, output)) if base.config.output_norms else at
            _hook(model.get_submodule(at), model.get_submodule(end), own)
    config = {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "bottleneck_size": width,
        "non_linearity": "silu",
        "placements": ["attention", "mlp"],
        "reads": "normed",
        "scaling": 0.8,
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return model


def _hook(block: torch.nn.Module, end: torch.nn.Module, own: Mapping[str, torch.Tensor]) -> None:
    seen: dict[str, torch.Tensor] = {}

    def read(_: Any, inputs: Any, keywords: Any) -> None:
        seen["normed"] = inputs[0] if inputs else keywords["hidden_states"]

    def add(_: Any, inputs: Any, output: Any) -> Any:
        inner = f.silu(f.linear(seen["normed"], own["down.weight"], own["down.bias"]))
        more = 0.8 * f.linear(inner, own["up.weight"], own["up.bias"])
        return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more

    block.register_forward_pre_hook(read, with_kwargs=True)
    end.register_forward_hook(add)
