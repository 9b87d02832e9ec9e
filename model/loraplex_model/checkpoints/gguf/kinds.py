"""Refusals of GGUF files that are not base models; each names what the file is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraplex_model.base.refusal import model_invalid, model_unsupported
from loraplex_model.checkpoints.gguf.header import shown

_TYPES = {
    "adapter": "an adapter, not a base model; register the PEFT adapter that it was made from",
    "imatrix": "an importance matrix for quantising, not a model",
    "control vector": "a control vector, not a model",
    "mmproj": "the vision or audio encoder of a multimodal model; give the file of the text model",
}
"""What a file of each `general.type` is, other than "model"."""

_BY_ARCHITECTURE = {"clip": "mmproj", "controlvector": "control vector"}
_PREFIXES = {"adapter.": "adapter", "imatrix.": "imatrix", "clip.": "mmproj"}
"""Keys of files of these types, some of which state none."""

_QUANTISATION = 2
"""The version of the quantised types' layouts, since May 2023."""


def refuse_others(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    supported: Collection[str],
    mixtures: Collection[str],
) -> None:
    """Refuses all but a model of an architecture of `supported`.

    Mixtures of experts are taken if their architecture is one of `mixtures`. Raises `Refusal`:
    MODEL_UNSUPPORTED, MODEL_INVALID.
    """
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if isinstance(architecture, str):
        kind = _BY_ARCHITECTURE.get(architecture, kind)
    for prefix, other in _PREFIXES.items():
        if kind == "model" and any(key.startswith(prefix) for key in metadata):
            kind = other
    if kind != "model":
        what = _TYPES.get(str(kind), f"of general.type {shown(kind)}, not a model")
        raise model_unsupported(f"{path} is {what}")
    if not isinstance(architecture, str):
        raise model_invalid(f"{path} has no general.architecture")
    count = metadata.get(f"{architecture}.expert_count")
    if architecture not in mixtures and _states_experts(count):
        raise model_unsupported(
            f"{path} is a mixture of experts ({architecture}.expert_count = {shown(count)}); "
            f"mixtures are read from files of the architectures {', '.join(sorted(mixtures))}"
        )
    if architecture not in supported:
        raise model_unsupported(
            f"{path} is of GGUF architecture {shown(architecture)}; "
            f"supported: {', '.join(sorted(supported))}"
        )
    if not tensors:
        raise model_unsupported(f"{path} holds a vocabulary only, without the model's tensors")
    version = metadata.get("general.quantization_version", _QUANTISATION)
    if version != _QUANTISATION:
        raise model_unsupported(
            f"{path} has general.quantization_version = {shown(version)}; "
            f"supported: {_QUANTISATION}"
        )
    _refuse_other_keys(path, metadata, architecture)


def _states_experts(count: Any) -> bool:
    return any(count) if isinstance(count, list) else bool(count)


def _refuse_other_keys(path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
    """Refuses settings of another architecture. Other keys are notes of the file's maker."""
    from gguf.constants import MODEL_ARCH_NAMES

    foreign = {*MODEL_ARCH_NAMES.values(), "xielu"} - {architecture}
    for key, value in metadata.items():
        prefix, _, rest = key.partition(".")
        if rest and prefix in foreign:
            raise model_unsupported(
                f"{path} is of GGUF architecture {shown(architecture)}, but has "
                f"{key} = {shown(value)}"
            )
