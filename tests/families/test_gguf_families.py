"""Each family that llama.cpp writes, from a GGUF file: the logits are those of transformers.

The files lack some settings, which llama.cpp computes from others; the models here have the values
that it computes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import variants
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.families import FAMILIES
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.gguf.architectures import ARCHITECTURES
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.reference import ReferenceDecoder
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from model import gguf_files

pytestmark = pytest.mark.slow

_SCALAR = {"query_pre_attn_scalar": 32}
_SHORT = {"rope_parameters": {**variants._LONG, "original_max_position_embeddings": 256}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-mlp-bias", {}),
    "mistral": ("llama-mlp-bias", {"attention_bias": False, "mlp_bias": False}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _SCALAR),
    "gemma2-caps": ("gemma2-strong-caps", _SCALAR),
    "gemma3": ("gemma3", {**_SCALAR, "layer_types": None, "num_hidden_layers": 7}),
    "gemma3-caps": (
        "gemma3",
        {**_SCALAR, "layer_types": None, "num_hidden_layers": 6, "final_logit_softcapping": 2.0},
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3-window", {}),
    "phi4-mini": ("phi4-mini", {}),
    "phi4-mini-short": ("phi4-mini", {**_SHORT, "original_max_position_embeddings": 256}),
    "smollm3": ("smollm3", {"no_rope_layers": None}),
    "smollm3-bias": ("smollm3-window-bias", {"use_sliding_window": False, "layer_types": None}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-bias": ("glm4", {"attention_bias": True}),
    "cohere": ("cohere", {}),
    "cohere-plain": ("cohere", {"use_qk_norm": False}),
    "cohere2": ("cohere2", {"layer_types": None, "num_hidden_layers": 5}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm-parallel", {}),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3-moe", {"norm_topk_prob": True}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5-plain": ("ernie4_5", {"use_bias": False}),
}
"""A variant of `variants.VARIANTS` for each case, and what differs from it."""


@functools.cache
def built(case: str) -> PreTrainedModel:
    """The model of a case, which must not be changed."""
    return build(case)


def build(case: str) -> PreTrainedModel:
    variant, changes = CASES[case]
    kind, own = variants.VARIANTS[variant]
    return of(kind, {**own, **changes})


def of(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    """A random model; a setting that is None has transformers' default."""
    values = {**variants._SHAPE, **settings}
    config = CONFIG_MAPPING[kind](**{key: v for key, v in values.items() if v is not None})
    return variants.randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32), 0)


def logits(weights: BaseWeights, ids: torch.Tensor) -> torch.Tensor:
    count = len(ids)
    decoder = ReferenceDecoder(weights, 8, 16, 1, keep_dense=True)
    is_long = count > weights.config.short_positions > 0
    batch = ForwardBatch.build([(ids.tolist(), 0, [0, 1, 2], ())], list(range(count)), [is_long])
    return decoder.forward(batch)


@functools.cache
def tokens() -> torch.Tensor:
    return torch.randint(3, variants.VOCAB, (40,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_computes_what_transformers_does(case: str, tmp_path: Path) -> None:
    model = build(case)
    path = gguf_files.write_model(model, tmp_path / "m.gguf")
    weights = load_base(str(path), torch.float32, tmp_path / "cache").weights
    model = variants.rounded(model)
    for count in (12, 40):
        ids = tokens()[:count]
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        torch.testing.assert_close(logits(weights, ids), expected, atol=1e-4, rtol=1e-5)


def test_every_architecture_has_a_case() -> None:
    families = {family.model_type: family for family in FAMILIES.values()}
    shown = {families[variants.VARIANTS[variant][0]].gguf for variant, _ in CASES.values()}
    stated = {family.gguf for family in FAMILIES.values()} - {""}
    tested_elsewhere = {"qwen2", "qwen3"}
    assert stated == shown | tested_elsewhere == set(ARCHITECTURES)
