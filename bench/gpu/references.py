"""Tiny models of several families with the logits of Hugging Face's own code, in one file.

They are made where transformers and bitsandbytes are, with the models of tests/model, and hold
weights, tokens and float64 logits. So a machine with neither package can compare itself with them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.weights import BaseWeights, LayerWeights, NF4Matrix

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / ".gpu" / "ref.npz"
FAMILIES = ("stablelm-parallel", "gemma2-strong-caps")
"""Names of models in tests/families/variants.py: LayerNorm, parallel blocks, a part of a head
rotated; norms of outputs, scaled embeddings, capped scores and logits."""

VARIANTS = (
    *("llama", "llama-rope-llama3", "mistral-window", "qwen2", "qwen3-window-bias"),
    *FAMILIES,
)
"""Names of all models, the others in tests/model/tiny.py: biases, norms of heads, windows, tied
embeddings."""

LENGTHS = (37, 5, 20)


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A tiny model on a device, and what Hugging Face computes for it.

    Attributes:
        weights: with the dense tensors in float32; bfloat16 can hold their values too.
        prompts: token ids.
        logits: float64 [tokens, vocab] for each prompt, on the CPU.
    """

    weights: BaseWeights
    prompts: tuple[list[int], ...]
    logits: tuple[torch.Tensor, ...]


def make(variants: Sequence[str] = VARIANTS) -> dict[str, np.ndarray]:
    """Builds the models and computes their logits; needs transformers and bitsandbytes."""
    sys.path.append(str(ROOT / "tests"))
    from families import variants as families
    from loraplex_model.checkpoints.load import load_base

    from model import passes, tiny

    found: dict[str, np.ndarray] = {}
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            write = families.write if variant in FAMILIES else tiny.write
            directory = write(variant, Path(folder) / variant)
            base = load_base(str(directory), torch.float32, Path(folder) / "cache")
            for name, value in as_arrays(base.weights).items():
                found[f"{variant}/{name}"] = value
        if variant in FAMILIES:
            oracle, vocab = families.rounded(families.build(variant)).double(), families.VOCAB
        else:
            oracle, vocab = tiny.oracle(variant).double(), tiny.VOCAB
        for i, length in enumerate(LENGTHS):
            ids = passes.token_ids(i, length, vocab)
            with torch.no_grad():
                logits = oracle(torch.tensor([ids])).logits[0]
            found[f"{variant}/tokens{i}"] = np.array(ids, np.int32)
            found[f"{variant}/logits{i}"] = logits.double().numpy()
    return found


def load(variant: str, device: str, dtype: torch.dtype) -> ReferenceModel:
    """A model on a device, in a compute dtype; from the carried file if there is one."""
    arrays: Mapping[str, np.ndarray]
    arrays = np.load(CARRIED) if CARRIED.exists() else make([variant])
    prefix = f"{variant}/"
    own = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    prompts = tuple(own[f"tokens{i}"].tolist() for i in range(len(LENGTHS)))
    logits = tuple(torch.from_numpy(own[f"logits{i}"]) for i in range(len(LENGTHS)))
    return ReferenceModel(of_arrays(own, device, dtype), prompts, logits)


def as_arrays(weights: BaseWeights) -> dict[str, np.ndarray]:
    """All tensors of a base by name, and its settings as text."""
    found: dict[str, np.ndarray] = {"config": np.array(json.dumps(asdict(weights.config)))}

    def put(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.clone().numpy()
        elif isinstance(value, NF4Matrix):
            for part in ("packed", "absmax"):
                put(f"{name}.{part}", getattr(value, part))
            for i, scale in enumerate(value.absmax_scales):
                put(f"{name}.scales{i}", scale)
            found[f"{name}.offsets"] = np.array(value.absmax_offsets, np.float64)
            found[f"{name}.rows"] = np.array(value.rows, np.int64)
            found[f"{name}.shape"] = np.array(value.shape, np.int64)
        elif isinstance(value, Mapping):
            for key, each in value.items():
                put(f"{name}.{key}", each)

    for name in ("embed", "norm", "norm_bias", "lm_head"):
        put(name, getattr(weights, name))
    for i, layer in enumerate(weights.layers):
        for field in fields(LayerWeights):
            put(f"layer{i}.{field.name}", getattr(layer, field.name))
    return found


def of_arrays(arrays: Mapping[str, np.ndarray], device: str, dtype: torch.dtype) -> BaseWeights:
    """The base that `as_arrays` described."""
    config = DecoderConfig.from_json(json.loads(str(arrays["config"])))

    def dense(name: str) -> torch.Tensor | None:
        if name not in arrays:
            return None
        return torch.from_numpy(arrays[name]).to(device, dtype)

    def matrix(name: str) -> NF4Matrix:
        rows = tuple(arrays[f"{name}.rows"].tolist())
        scales = [arrays[f"{name}.scales{i}"] for i in range(len(rows))]
        return NF4Matrix(
            tuple(arrays[f"{name}.shape"].tolist()),
            torch.from_numpy(arrays[f"{name}.packed"]).to(device),
            torch.from_numpy(arrays[f"{name}.absmax"]).to(device),
            tuple(torch.from_numpy(scale).to(device) for scale in scales),
            tuple(arrays[f"{name}.offsets"].tolist()),
            rows,
        )

    layers = []
    for i in range(config.num_layers):
        parts: dict[str, Any] = {}
        for field in fields(LayerWeights):
            name = f"layer{i}.{field.name}"
            parts[field.name] = matrix(name) if f"{name}.packed" in arrays else dense(name)
        biases = {name: dense(f"layer{i}.norm_biases.{name}") for name in config.norm_widths()}
        parts["norm_biases"] = {name: bias for name, bias in biases.items() if bias is not None}
        layers.append(LayerWeights(**parts))
    embed, norm, head = dense("embed"), dense("norm"), dense("lm_head")
    assert embed is not None
    assert norm is not None
    assert head is not None
    head = embed if config.tie_embeddings else head
    bias = dense("norm_bias")
    return BaseWeights(
        config, embed, tuple(layers), norm, head, "sha256:tiny", (2,), norm_bias=bias
    )
