"""Adapter directories that PEFT itself writes, on the tiny models of `model.tiny`."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.base.info import BaseInfo
from loraplex_model.checkpoints.load import load_base
from safetensors.torch import load_file, save_file

from model import tiny

FINGERPRINT = "sha256:" + "ba5e" * 16


def base_info(variant: str) -> BaseInfo:
    """A tiny model as adapters are held against it, with its stored weights."""
    kind, changes = tiny.VARIANTS[variant]
    config = decoder_config({**kind(**tiny._SHAPE | changes).to_dict()})
    return BaseInfo(config, FINGERPRINT, "float32", weights_file=_stored(variant))


@cache
def _stored(variant: str) -> str:
    """The converted model's file, which is removed at the end of the process."""
    place = Path(_folder().name)
    checkpoint = tiny.write(variant, place / variant)
    return load_base(str(checkpoint), torch.float32, place / "cache").weights.file


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="bases-")


@dataclass(frozen=True)
class Case:
    """One adapter: the base, PEFT's configuration class and its arguments.

    `sites` are the expected roles in the first layer and outside the layers. `prepare` changes
    the model before it is saved, `edit` the tensors of the file after that. `added` are keys of
    the configuration that PEFT does not know. `task` is the task that PEFT computes.
    """

    variant: str
    kind: str
    options: dict[str, Any]
    sites: dict[tuple[int, str], str]
    prepare: Callable[[Any], None] | None = None
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None
    added: dict[str, Any] = field(default_factory=dict)
    task: int | None = None


def write(case: Case, directory: Path, *, seed: int = 0) -> Path:
    """Creates an adapter with PEFT, fills it with noise, and saves it with PEFT."""
    config = getattr(peft, case.kind)(task_type="CAUSAL_LM", **case.options)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # PEFT's own initial values
        model = peft.get_peft_model(tiny.build(case.variant), config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        if case.prepare:
            case.prepare(model)
        model.create_or_update_model_card = lambda _: None  # takes longer than all the rest
        model.save_pretrained(directory)
    if case.edit:
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        case.edit(tensors)
        save_file(tensors, file, {"format": "pt"})
    if case.added:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **case.added}))
    return directory


def amplify(name: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """An edit that multiplies the tensors of this name, so that the adapter changes an answer."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if name in key:
                tensors[key] = tensors[key] * factor

    return edit


def prune(masks: dict[str, list[bool]]) -> Callable[[Any], None]:
    """Prunes AdaLoRA's modules to the singular values in their masks, as its schedule does."""

    def apply(model: Any) -> None:
        model.peft_config["default"].rank_pattern = {
            f"{path}.lora_E": mask for path, mask in masks.items()
        }

    return apply


Q = "q_proj"
LORA = {"r": 4, "lora_alpha": 8}
AB = "a b"
FIRST = (0, Q)
EMBED, HEAD, NORM = (-1, "embed_tokens"), (-1, "lm_head"), (-1, "norm")
VIRTUAL = (-1, "virtual_tokens")
TIED = "llama-tied-bias"


def lora(variant: str, sites: dict[tuple[int, str], str], **options: Any) -> Case:
    """A LORA case that also targets q_proj, unless its options override that."""
    options = {"target_modules": [Q], **LORA, **options}
    return Case(variant, "LoraConfig", options, sites)


CASES: dict[str, Case] = {
    "lora": lora("llama", {FIRST: AB}),
    "fan_in_fan_out": lora("llama", {FIRST: AB}, fan_in_fan_out=True),
    "dora": lora("llama", {FIRST: "a b magnitude"}, use_dora=True),
    "dora on a biased base": lora("qwen2", {FIRST: "a b magnitude"}, use_dora=True),
    "excluded": lora(
        "llama",
        {FIRST: AB},
        target_modules="all-linear",
        exclude_modules=["mlp", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "expressions": lora(
        "llama",
        {FIRST: AB, (0, "up_proj"): AB},
        target_modules=r"model.layers.[\d]+.(mlp|self_attn).(up|q|k)_proj",
        exclude_modules=r".*(vision_tower|k_proj).*",
        rank_pattern={r".*\.layers\.[01]\..*(q_proj|v_proj)$": 3},
        alpha_pattern={r"layers\.(?:0|2)\.(?:self_attn|mlp)\.[a-z_]+": 11},
    ),
    "some layers": lora("llama", {FIRST: AB}, layers_to_transform=[0, 2]),
    "bias all": lora(
        TIED,
        {FIRST: "a b bias", (0, "k_proj"): "bias", (0, "v_proj"): "bias", (0, "o_proj"): "bias"},
        bias="all",
    ),
    "bias all without biases": lora("llama", {FIRST: AB}, bias="all"),
    "bias lora_only": lora(TIED, {FIRST: "a b bias"}, bias="lora_only"),
    "bias of some": lora(
        "qwen2",
        {FIRST: "a b bias", (0, "o_proj"): AB, (0, "k_proj"): "bias", (0, "v_proj"): "bias"},
        target_modules=[Q, "o_proj"],
        bias="all",
    ),
    "lora_bias": lora(TIED, {FIRST: "a b b_bias"}, lora_bias=True),
    "head": lora("llama", {FIRST: AB, HEAD: AB}, target_modules=[Q, "lm_head"]),
    "embeddings": lora("llama", {FIRST: AB, EMBED: AB}, target_modules=[Q, "embed_tokens"]),
    "embeddings and head": lora(
        "llama", {EMBED: AB, HEAD: AB}, target_modules=["embed_tokens", "lm_head"]
    ),
    "tied head": lora(TIED, {FIRST: AB, HEAD: AB}, target_modules=[Q, "lm_head"]),
    "tied embeddings": lora(TIED, {FIRST: AB, EMBED: AB}, target_modules=[Q, "embed_tokens"]),
    "tied, both by one": lora(
        TIED,
        {FIRST: AB, EMBED: AB, HEAD: AB},
        target_modules=[Q, "embed_tokens"],
        ensure_weight_tying=True,
    ),
    "tokens": lora("llama", {FIRST: AB, EMBED: "rows"}, trainable_token_indices=[5, 3, 9]),
    "tokens of both": lora(
        "llama",
        {FIRST: AB, EMBED: "rows", HEAD: "rows"},
        trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [1]},
    ),
    "tied tokens": lora(
        TIED,
        {FIRST: AB, EMBED: "rows", HEAD: "rows"},
        trainable_token_indices={"embed_tokens": [5, 3]},
    ),
    "tied tokens, named twice": lora(
        TIED,
        {FIRST: AB, EMBED: "rows", HEAD: "rows"},
        trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [5, 3]},
    ),
    "tied tokens that differ": lora(
        TIED,
        {FIRST: AB, EMBED: "rows", HEAD: "rows"},
        trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [1, 2, 7]},
    ),
    "saved head": lora("llama", {FIRST: AB, HEAD: "weight"}, modules_to_save=["lm_head"]),
    "saved norms": lora(
        "qwen3",
        {
            FIRST: AB,
            **{
                (0, name): "weight"
                for name in ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
            },
            NORM: "weight",
        },
        modules_to_save=["norm"],
    ),
    "saved tied embeddings": lora(
        TIED, {FIRST: AB, EMBED: "weight"}, modules_to_save=["embed_tokens"]
    ),
    "saved tied head": lora(TIED, {FIRST: AB, HEAD: "weight"}, modules_to_save=["lm_head"]),
    "saved tied, both": lora(
        TIED,
        {FIRST: AB, EMBED: "weight", HEAD: "weight"},
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
    "saved over a target": lora(
        "llama",
        {FIRST: AB, HEAD: "weight"},
        target_modules=[Q, "lm_head"],
        modules_to_save=["lm_head"],
    ),
    "adalora": Case(
        "llama",
        "AdaLoraConfig",
        {"target_modules": [Q, "lm_head"], "init_r": 6, "target_r": 3, "total_step": 10},
        {FIRST: "a b e", HEAD: "a b e"},
    ),
    "adalora, pruned": Case(
        TIED,
        "AdaLoraConfig",
        {"target_modules": [Q, "v_proj"], "init_r": 4, "total_step": 10, "bias": "lora_only"},
        {FIRST: "a b e bias", (0, "v_proj"): "bias"},
        prune(
            {
                f"model.layers.{layer}.self_attn.{name}": mask
                for layer in range(3)
                for name, mask in ((Q, [True, False, True, layer > 0]), ("v_proj", [False] * 4))
            }
        ),
    ),
    "ia3": Case(
        "llama",
        "IA3Config",
        {},
        {(0, "k_proj"): "out_gain", (0, "v_proj"): "out_gain", (0, "down_proj"): "in_gain"},
    ),
    "ia3 on squares": Case(
        "qwen2",
        "IA3Config",
        {
            "target_modules": [Q, "o_proj", "gate_proj", "up_proj"],
            "feedforward_modules": ["o_proj", "gate_proj"],
            "modules_to_save": ["lm_head"],
        },
        {
            FIRST: "out_gain",
            (0, "o_proj"): "in_gain",
            (0, "gate_proj"): "in_gain",
            (0, "up_proj"): "out_gain",
            HEAD: "weight",
        },
    ),
    "ia3 by expressions": Case(
        "llama",
        "IA3Config",
        {"target_modules": r".*\.(q|o)_proj", "feedforward_modules": r".*\.o_proj"},
        {FIRST: "out_gain", (0, "o_proj"): "in_gain"},
    ),
    "beft": Case(
        "qwen2",
        "BeftConfig",
        {"target_modules": [Q, "o_proj"]},
        {FIRST: "bias_delta", (0, "o_proj"): "bias_delta"},
    ),
    "norms": Case(
        "llama",
        "LNTuningConfig",
        {},
        {
            (0, "input_layernorm"): "weight",
            (0, "post_attention_layernorm"): "weight",
            NORM: "weight",
        },
    ),
    "norms of heads": Case(
        "qwen3",
        "LNTuningConfig",
        {"target_modules": ["q_norm", "norm"]},
        {(0, "q_norm"): "weight", NORM: "weight"},
    ),
    "tokens alone": Case(
        "llama", "TrainableTokensConfig", {"token_indices": [5, 3]}, {EMBED: "rows"}
    ),
    "tokens alone, tied": Case(
        TIED, "TrainableTokensConfig", {"token_indices": [5, 3]}, {EMBED: "rows", HEAD: "rows"}
    ),
    "tokens alone, both": Case(
        "llama",
        "TrainableTokensConfig",
        {"token_indices": [7], "target_modules": ["embed_tokens", "lm_head"]},
        {EMBED: "rows", HEAD: "rows"},
    ),
    "prompt": Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 5}, {VIRTUAL: "prompt"}),
    "p-tuning": Case(
        "llama",
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 8},
        {VIRTUAL: "prompt"},
    ),
    "p-tuning by LSTM": Case(
        "llama",
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": 3,
            "encoder_hidden_size": 8,
            "encoder_reparameterization_type": "LSTM",
        },
        {VIRTUAL: "prompt"},
    ),
    "prefix": Case("llama", "PrefixTuningConfig", {"num_virtual_tokens": 5}, {VIRTUAL: "prefix"}),
    "prefix from an encoder": Case(
        "qwen3",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
        {VIRTUAL: "prefix"},
    ),
    "cartridge": Case(
        "llama",
        "CartridgeConfig",
        {"num_virtual_tokens": 5, "num_frozen_tokens": 2},
        {VIRTUAL: "prefix"},
    ),
    "context-aware prompt": Case(
        "llama",
        "CPTConfig",
        {
            "cpt_token_ids": [3, 8, 1, 9],
            "cpt_mask": [1, 1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3, 4],
            "opt_projection_epsilon": 8.0,
        },
        {VIRTUAL: "prompt"},
    ),
    "prompt of a task": Case(
        "llama",
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 2},
        {VIRTUAL: "prompt task_cols task_rows"},
        edit=amplify("prefix_task", 10.0),
        added={"loraplex_task": 2},
        task=2,
    ),
    "prompt of the only task": Case(
        TIED,
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 3},
        {VIRTUAL: "prompt task_cols task_rows"},
        edit=amplify("prefix_task", 10.0),
        task=0,
    ),
}
"""What is served, as PEFT writes it."""
