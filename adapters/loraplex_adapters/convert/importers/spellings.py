"""Plans the conversion of adapters that differ from PEFT's only in names and layout.

PEFT's own files under other names   renamed; `format.foreign.names` has the spellings
MLX (`adapters.safetensors`)         A and B transposed; alpha = scale * rank
mistral-finetune (`lora.safetensors`) renamed; the rows of B at q and k reordered, since Mistral's
                                     checkpoints store pairs of the rotary embedding side by side
                                     and Hugging Face's store halves

A plan is made from names, shapes and configurations alone. Nothing here reads or writes tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Problem, Reason, Refusal

from loraplex_adapters.format.files import CONFIG_FILE
from loraplex_adapters.format.foreign.causes import is_of_another_form
from loraplex_adapters.format.foreign.names import PREFIX, Wrapper, adapters_in, spelling
from loraplex_adapters.format.spec import TensorLocation
from loraplex_adapters.format.strict_json import shown

_MLX = re.compile(r"\A(.{1,400})\.lora_([ab])\Z")
_MISTRAL = re.compile(
    r"\Alayers\.(0|[1-9][0-9]{0,4})\.(attention\.w[qkvo]|feed_forward\.w[123])\.lora_([AB])\.weight\Z"
)
_MISTRAL_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True, slots=True)
class Rewriting:
    """What becomes of one tensor.

    Attributes:
        name: PEFT's name.
        transposed: whether rows and columns are exchanged.
        heads: number of attention heads whose rows are reordered from pairs to halves; 0 for none.
    """

    name: str
    transposed: bool = False
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A conversion: a step for each tensor by its name, the new configuration, and a summary."""

    steps: Mapping[str, Rewriting]
    config: Mapping[str, Any]
    lines: Sequence[str] = ()


def plan_peft(tensors: Iterable[TensorLocation], config: Mapping[str, Any]) -> Plan:
    """The plan for an adapter of PEFT whose names differ. Raises Refusal(CONVERT_UNSUPPORTED)."""
    steps: dict[str, Rewriting] = {}
    examples: dict[Wrapper, str] = {}
    names: dict[str, str] = {}
    found = {tensor.name: spelling(tensor.name) for tensor in tensors}
    if any(map(is_of_another_form, found)):
        return Plan({name: Rewriting(name) for name in found}, config)  # its check says what it is
    if len(adapters := adapters_in(s for s in found.values() if s)) > 1:
        listed = ", ".join(map(shown, adapters[:3]))
        raise _unsupported(f"the weights file has several adapters: {listed}; save each by itself")
    for name, spelt in found.items():
        target = spelt.name if spelt else name
        if target in names:
            raise _unsupported(
                f"{shown(name)} and {shown(names[target])} would both become {shown(target)};"
                " keep the one that was trained"
            )
        names[target] = name
        steps[name] = Rewriting(target)
        for wrapper in spelt.wrappers if spelt else ():
            examples.setdefault(wrapper, f"{shown(name)} becomes {shown(target)}")
    lines = [f"names that {w.value}: {example}" for w, example in examples.items()]
    if not lines:
        return Plan(steps, config)
    return Plan(steps, _renamed_config(config, names, lines), tuple(lines))


def plan_mlx(
    tensors: Iterable[TensorLocation], config: Mapping[str, Any], alpha: float | None
) -> Plan:
    """The plan for an adapter of MLX, whose configuration states rank and scale."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise _unsupported(f"the MLX adapter is of the type {shown(str(kind))}, not lora")
    settings = config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    scale = settings.get("scale")
    ambiguous = settings.get("alpha") is not None
    if alpha is None and (ambiguous or not _is_number(scale)):
        what = "states both scale and alpha, which versions of MLX combine differently"
        what = what if ambiguous else "does not state lora_parameters.scale"
        raise _unsupported(f"{CONFIG_FILE} {what}; give --alpha (scale times rank)")
    steps: dict[str, Rewriting] = {}
    ranks: dict[str, int] = {}
    for tensor in tensors:
        matched = _MLX.match(tensor.name)
        spelt = spelling(f"{matched[1]}.weight") if matched else None
        if matched is None or spelt is None or len(tensor.shape) != 2:
            raise _unsupported(f"{shown(tensor.name)} is not a tensor of a plain LoRA of MLX")
        path = spelt.name.removesuffix(".weight")
        half = matched[2].upper()
        embedding = path.endswith(".embed_tokens")
        ending = f"lora_embedding_{half}" if embedding else f"lora_{half}.weight"
        steps[tensor.name] = Rewriting(f"{path}.{ending}", transposed=True)
        if half == "A":
            ranks[path.removeprefix(PREFIX)] = tensor.shape[1]
    rank = _one_rank(ranks)
    alpha = float(scale) * rank if alpha is None else alpha  # type: ignore[arg-type]
    line = f"MLX: A and B are transposed (modules: {len(ranks)}); alpha is {alpha:g}"
    base_model = config.get("model") if isinstance(config.get("model"), str) else None
    return Plan(steps, lora_settings(ranks, rank, alpha, base_model), (line,))


def plan_mistral(
    tensors: Iterable[TensorLocation],
    params: Mapping[str, Any],
    base: BaseInfo,
    alpha: float | None,
) -> Plan:
    """The plan for an adapter of mistral-finetune; `params` is its params.json, or empty."""
    settings = params.get("lora")
    scaling = settings.get("scaling") if isinstance(settings, dict) else None
    if alpha is None and not _is_number(scaling):
        message = "params.json is missing or states no lora.scaling; give --alpha (scaling times "
        raise _unsupported(message + "rank; mistral-finetune's scaling is 2 by default)")
    steps: dict[str, Rewriting] = {}
    ranks: dict[str, int] = {}
    for tensor in tensors:
        matched = _MISTRAL.match(tensor.name)
        if matched is None or len(tensor.shape) != 2:
            raise _unsupported(f"{shown(tensor.name)} is not a tensor of mistral-finetune's LoRA")
        path = f"model.layers.{matched[1]}.{_MISTRAL_MODULES[matched[2]]}"
        heads = 0
        if matched[3] == "A":
            ranks[path] = tensor.shape[0]
        elif matched[2] == "attention.wq":
            heads = base.config.num_heads
        elif matched[2] == "attention.wk":
            heads = base.config.num_kv_heads
        if heads and tensor.shape[0] != heads * base.config.head_dim:
            message = f"{shown(tensor.name)} has {tensor.shape[0]} rows; this base has "
            message += f"{heads} heads of {base.config.head_dim}"
            raise Refusal(Reason.BASE_MODEL_MISMATCH, message)
        steps[tensor.name] = Rewriting(f"{PREFIX}{path}.lora_{matched[3]}.weight", heads=heads)
    rank = _one_rank(ranks)
    alpha = float(scaling) * rank if alpha is None else alpha  # type: ignore[arg-type]
    lines = [f"mistral-finetune: modules get PEFT's names ({len(ranks)}); alpha is {alpha:g}"]
    if any(step.heads for step in steps.values()):
        lines.append("the rows of q and k are reordered from Mistral's layout to Hugging Face's")
    return Plan(steps, lora_settings(ranks, rank, alpha, None), tuple(lines))


def lora_settings(
    ranks: Mapping[str, int], rank: int, alpha: float, base_model: object
) -> dict[str, Any]:
    """Configuration of a plain LoRA adapter of one rank, whose modules are named by their paths."""
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _renamed_config(
    config: Mapping[str, Any], names: Iterable[str], lines: list[str]
) -> dict[str, Any]:
    """The configuration for the new names of tensors; a changed option is added to `lines`.

    Targets given by an expression or a word are replaced by the paths of the adapted modules.
    """
    made = dict(config)
    targets = config.get("target_modules")
    if isinstance(targets, str):
        made["target_modules"] = _adapted(names)
        made["exclude_modules"] = None
        lines.append("target_modules lists the adapted modules by their paths")
    elif isinstance(targets, list):
        made["target_modules"] = [_path(item) for item in targets]
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := config.get(key), dict):
            made[key] = {_path(name): value for name, value in pattern.items()}
    return made


def _adapted(names: Iterable[str]) -> list[str]:
    paths = set()
    for name in names:
        path, _, ending = name.removeprefix(PREFIX).rpartition(".lora_")
        if path and f"lora_{ending}".startswith(_FACTORS):
            paths.add(path)
    return sorted(paths)


def _path(name: Any) -> Any:
    """A module's path as PEFT's file would have it, where `name` is a path; else `name`."""
    if name == "unembed_tokens":
        return "lm_head"
    if not isinstance(name, str) or "." not in name:
        return name
    spelt = spelling(name)
    return spelt.name.removeprefix(PREFIX) if spelt else name


def _one_rank(ranks: Mapping[str, int]) -> int:
    if not ranks:
        raise _unsupported("the weights file has no matrix A of an adapter")
    if len(set(ranks.values())) > 1:
        raise _unsupported(
            "the modules have different ranks, which needs a PEFT configuration with rank_pattern"
        )
    return next(iter(ranks.values()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unsupported(message: str) -> Refusal:
    reason = Reason.CONVERT_UNSUPPORTED
    return Refusal(reason, message, problems=[Problem("", message, reason)])
