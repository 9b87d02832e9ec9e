"""The inputs of an export: the base model, and adapters as the server reads them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.load import LoadedBase, load_base

from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter
from loraplex_adapters.load.tensors import load

LIMITS = AdapterLimits(max_rank=1 << 16, max_virtual_tokens=1 << 20, max_decompositions=math.inf)
"""Limits of exported adapters, which need not fit those of a server."""


def open_base(model: str, cache: Path) -> LoadedBase:
    """Loads a model by directory, GGUF file, hub id, or "default". Raises `Refusal`.

    All tensors except the NF4 matrices are float32.
    """
    return load_base(model, torch.float32, cache)


def open_adapter(directory: Path, base: LoadedBase) -> tuple[CheckedAdapter, AdapterDelta]:
    """Checks and reads an adapter as the server does; raises Refusal as `inspect` does.

    An activated LoRA is refused with EXPORT_UNSUPPORTED: no format of an export can say that the
    base alone computes the tokens before the invocation. PEFT refuses to merge it too.
    """
    spec = inspect(directory, base.weights.info, LIMITS)
    if spec.invocation_tokens:
        message = (
            f"{directory.name} is an activated LoRA (alora_invocation_tokens), which acts on a "
            "part of each sequence only, so it cannot be merged, blended or converted; serve the "
            "adapter itself"
        )
        raise Refusal(Reason.EXPORT_UNSUPPORTED, message)
    return load(directory, spec.digest, base.weights, LIMITS)
