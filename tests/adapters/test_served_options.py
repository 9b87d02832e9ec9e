"""Every pair of values of the options of kinds by the served weight, and of variants of LoRA."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.adapter_files import llama_path
from adapters.peft_files import TIED, Case, write
from adapters.peft_kinds import Gallery
from adapters.test_folded_options import PROJECTIONS, TARGETS, covering
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.kinds.folded.peanut import ACTIVATIONS
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import ProjectionDelta, RowsDelta
from peft.tuners.lora import BdLoraConfig, KasaConfig, layer, variants

from model import tiny

pytestmark = pytest.mark.slow

PATTERN = {"k_proj": 4, r"layers\.1\..*down_proj": 8}
EXCLUDED = [None, ["v_proj"], r".*layers\.2\..*"]
BLOCKS = [
    BdLoraConfig(["self_attn"], ["mlp", "lm_head"], 2),
    BdLoraConfig(["down", "o_proj"], ["q_"], 4, match_strict=False),
    BdLoraConfig(None, None, 1, match_strict=False),
]
LORA: Mapping[str, Sequence[Any]] = {
    "r": [4, 12],
    "lora_alpha": [3, -8],
    "use_rslora": [False, True],
    "lora_bias": [False, True],
    "bias": ["none", "all", "lora_only"],
    "rank_pattern": [{}, PATTERN],
    "alpha_pattern": [{}, {"o_proj": 9}],
    "lora_dropout": [0.0, 0.5],
}
OPTIONS: dict[str, tuple[str, Mapping[str, Sequence[Any]]]] = {
    "delora": (
        "DeloraConfig",
        {
            **TARGETS,
            "r": [1, 3, 16],
            "delora_lambda": [1, 15],
            "rank_pattern": [{}, PATTERN],
            "lambda_pattern": [{}, {"o_proj": 9}],
            "bias": ["none", "all", "delora_only"],
            "module_dropout": [0.0, 0.5],
            "init_weights": [True, False],
            "exclude_modules": EXCLUDED,
        },
    ),
    "hra": (
        "HRAConfig",
        {
            **TARGETS,
            "r": [1, 2, 9],
            "apply_GS": [False, True],
            "bias": ["none", "all", "hra_only"],
            "init_weights": [True, False],
            "exclude_modules": EXCLUDED,
        },
    ),
    "deft": (
        "DeftConfig",
        {
            **TARGETS,
            "r": [1, 5, 100],
            "alpha": [None, 3],
            "decomposition_method": ["relu", "qr"],
            "para": [False, True],
            "bias": ["none", "all", "deft_only"],
            "init_scale": [1.0, 3.0],
            "deft_dropout": [0.0, 0.5],
            "fan_in_fan_out": [False],
            "init_weights": [True, False],
        },
    ),
    "peanut": (
        "PeanutConfig",
        {
            **TARGETS,
            "r": [2, 9],
            "depth": [0, 2],
            "act_fn": ACTIVATIONS,
            "scaling": [1.0, -0.5],
            "init_weights": [True, False],
        },
    ),
    "vblora": (
        "VBLoRAConfig",
        {
            **TARGETS,
            "r": [1, 5],
            "num_vectors": [3, 300],
            "topk": [1, 2, 3],
            "vector_length": [8, 64],
            "bias": ["none", "all", "vblora_only"],
            "vblora_dropout": [0.0, 0.5],
            "fan_in_fan_out": [False, True],
        },
    ),
    "bd-lora": (
        "LoraConfig",
        {"target_modules": [[*PROJECTIONS], "all-linear"], **LORA, "use_bdlora": BLOCKS},
    ),
    "kasa": (
        "LoraConfig",
        {"target_modules": [["q_proj", "k_proj"], ["down_proj", "v_proj"]], **LORA}
        | {"kasa_config": [KasaConfig(), KasaConfig(beta=1.0, gamma=0.0)]},
    ),
}
CASES = [
    pytest.param(kind, options, id=f"{name}-{n}")
    for name, (kind, values) in OPTIONS.items()
    for n, options in enumerate(covering(values))
]


def change_of(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """PEFT's change of a module's weight [fan_out, fan_in], from what the module computes."""
    inputs = torch.eye(weight.shape[1])
    return (module(inputs) - module(torch.zeros_like(inputs))).T - weight


@pytest.fixture(scope="module")
def oracle() -> Any:
    """The model with the served weights, which PEFT adapts."""
    return tiny.oracle(TIED)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_qa_lora_acts_on_groups_as_pefts_layers_for_gptq_do(
    size: int,
    gallery: Gallery,
    oracle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT has it for bases in GPTQ's format only; here its variant is given to plain layers."""

    def variant(_: Any, *, config: Any, **__: Any) -> Any:
        return variants.QALoraLinearVariant()

    monkeypatch.setattr(layer.Linear, "resolve_lora_variant", variant)
    options = {"target_modules": [*PROJECTIONS], "r": 4, "lora_alpha": 1, "use_qalora": True}
    if size > 1:
        equal(gallery, oracle, tmp_path, "LoraConfig", {**options, "qalora_group_size": size})
    monkeypatch.undo()
    plain = tmp_path / "plain"  # PEFT ignores the option on other bases
    equal(gallery, oracle, plain, "LoraConfig", {**options, "qalora_group_size": size})


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_and_b_multiply_to_what_peft_adds(
    kind: str, options: dict[str, Any], gallery: Gallery, oracle: Any, tmp_path: Path
) -> None:
    equal(gallery, oracle, tmp_path, kind, options)


def equal(
    gallery: Gallery, oracle: Any, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Compares A and B of every folded module with what PEFT's module computes."""
    write(Case(TIED, kind, options, {}), tmp_path)
    base = copy.deepcopy(oracle)
    weights = {name: m.weight.clone() for name, m in base.named_modules() if hasattr(m, "weight")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, tmp_path).eval().base_model.model
        spec = inspect(tmp_path, gallery.shapes(TIED))
        _, delta = load(tmp_path, spec.digest, gallery.weights(TIED))
        adapted = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
        folded = {(m.layer, m.module): m for m in spec.modules if m.fold is not None}
        assert {llama_path(*site) for site in folded} == adapted.keys()
        for site, module in folded.items():
            change = delta.sites[site]
            assert isinstance(change, ProjectionDelta | RowsDelta)
            assert change.a is not None
            assert change.b is not None
            assert change.a.shape[0] == change.b.shape[0] == module.rank
            path = llama_path(*site)
            expected = change_of(adapted[path], weights[path])
            found = change.b.T @ change.a.float()
            torch.testing.assert_close(found, expected, atol=3e-5, rtol=3e-5)
