"""The base model of an export: its weights as they are served, and the files they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints import checkpoint
from loraplex_model.checkpoints.default_model import DEFAULT, ensure_default_model
from loraplex_model.checkpoints.load import load_base

from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter
from loraplex_adapters.load.tensors import load

LIMITS = AdapterLimits(max_rank=1 << 16, max_virtual_tokens=1 << 20)
"""Limits of exported adapters, which need not fit those of a server."""


@dataclass(frozen=True, slots=True)
class ExportBase:
    """A loaded base model.

    Attributes:
        name: name under which the operator asked for it.
        source: directory of the checkpoint, or the GGUF file.
        directory: entry in the cache, with `tokenizer.json` and `model.json`.
        weights: NF4 matrices; all other tensors float32, as stored.
    """

    name: str
    source: Path
    directory: Path
    weights: BaseWeights


def open_base(model: str, cache: Path) -> ExportBase:
    """Loads a model by directory, GGUF file, hub id, or "default". Raises `Refusal`."""
    is_default = model in ("", DEFAULT)
    source = ensure_default_model(cache) if is_default else checkpoint.locate(model)
    loaded = load_base(model, torch.float32, cache)
    return ExportBase(loaded.name, source, loaded.directory, loaded.weights)


def open_adapter(directory: Path, base: ExportBase) -> tuple[CheckedAdapter, AdapterDelta]:
    """Checks and reads an adapter as the server does; raises Refusal as `inspect` does."""
    digest = inspect(directory, base.weights.info, LIMITS).digest
    return load(directory, digest, base.weights, LIMITS)
