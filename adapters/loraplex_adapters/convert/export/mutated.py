"""Converts PiSSA, OLoRA, CorDA and LoRA-GA adapters to plain LoRA.

Their initialisation subtracts scale * B0 A0 from the base's weight, so that A and B are not the
whole change. Given the adapter as it was before training, the change is

    scale * (B A - B0 A0) = scale * [B, -B0] [A; A0],

a plain adapter of twice the rank. This is exact if the base was not quantised in training. A base
quantised after the initialisation is Q(W - B0 A0), and no adapter of Q(W) expresses the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.ops.dtypes import BY_SAFETENSORS

from loraplex_adapters.convert.export.directory import write_json
from loraplex_adapters.format.config import load_config
from loraplex_adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, open_directory
from loraplex_adapters.format.header import read_header
from loraplex_adapters.format.kinds.initialisation import MUTATING
from loraplex_adapters.format.strict_json import shown

_A, _B = ".lora_A.weight", ".lora_B.weight"
_SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_OFF = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication")
_MAX_BYTES = 8 << 30


_Files = tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]
"""Configuration and tensors of an adapter."""


def convert(source: Path, initial: Path, target: Path) -> None:
    """Converts a trained adapter, given its initial state, to plain LoRA in the new `target`.

    The result has not been checked against a base. Raises Refusal: CONVERT_UNSUPPORTED (another
    initialisation, DoRA, ...), ADAPTER_INVALID (the two do not belong together), and as reading
    adapters does.
    """
    (config, tensors), (start_config, start) = _read(source), _read(initial)
    plain = _plain_config(config, start_config)
    target.mkdir()
    write_json(target / CONFIG_FILE, plain)
    stamps = {"loraplex_converted_from": str(config["init_lora_weights"])}
    with SafetensorsFile(target / WEIGHTS_FILE, len(tensors), stamps) as file:
        for name, tensor in tensors.items():
            if "lora_" in name and not name.endswith((_A, _B)):
                message = f"{shown(name)} is neither A nor B of a projection"
                raise Refusal(Reason.CONVERT_UNSUPPORTED, message, shown(name))
            if name.endswith((_A, _B)):
                before = start.get(name)
                if before is None or before.shape != tensor.shape:
                    raise _mismatch(f"it has no {shown(name)} of the same shape")
                joined = [tensor, before] if name.endswith(_A) else [tensor, -before]
                tensor = torch.cat(joined, dim=0 if name.endswith(_A) else 1)
            file.add(name, tensor)


def _plain_config(config: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("init_lora_weights")
    if not isinstance(kind, str) or not kind.startswith(MUTATING):
        names = ", ".join(MUTATING)
        message = f"init_lora_weights is {shown(str(kind))}; only {names} can be converted"
        raise Refusal(Reason.CONVERT_UNSUPPORTED, message, "init_lora_weights")
    if config.get("peft_type") != "LORA":
        raise Refusal(Reason.CONVERT_UNSUPPORTED, "peft_type is not LORA", "peft_type")
    for key in _OFF:
        if config.get(key):
            raise Refusal(Reason.CONVERT_UNSUPPORTED, f"{key} cannot be converted", key)
    for key in _SAME:
        if (config.get(key) or None) != (start.get(key) or None):
            raise _mismatch(f"its {key} differs")
    return {
        **config,
        "corda_config": None,
        "init_lora_weights": True,
        "lora_ga_config": None,
        **_doubled(config),
    }


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks doubled, with alphas that leave every scale unchanged."""
    try:
        ranks = {key: int(rank) for key, rank in (config.get("rank_pattern") or {}).items()}
        alphas = {key: float(a) for key, a in (config.get("alpha_pattern") or {}).items()}
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, AttributeError):
        message = f"{CONFIG_FILE} has no valid r, lora_alpha and patterns"
        raise Refusal(Reason.ADAPTER_INVALID, message, CONFIG_FILE) from None
    factor = 2.0
    if config.get("use_rslora"):
        # alpha' / sqrt(2 r) = alpha / sqrt(r), for every rank
        factor = math.sqrt(2.0)
    return {
        "alpha_pattern": {key: _number(value * factor) for key, value in alphas.items()},
        "lora_alpha": _number(alpha * factor),
        "r": 2 * rank,
        "rank_pattern": {key: 2 * value for key, value in ranks.items()},
    }


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _read(directory: Path) -> _Files:
    with open_directory(directory) as opened:
        config = load_config(opened.read_config())
        with opened.open_weights(_MAX_BYTES) as weights:
            header = read_header(weights.read, weights.size)
            tensors = {
                t.name: torch.frombuffer(
                    bytearray(weights.read(t.start, t.end - t.start)), dtype=BY_SAFETENSORS[t.dtype]
                ).view(t.shape)
                for t in header.tensors
            }
    return config, tensors


def _mismatch(why: str) -> Refusal:
    message = f"the initial adapter is not the one that was trained: {why}"
    return Refusal(Reason.ADAPTER_INVALID, message, "initial")
