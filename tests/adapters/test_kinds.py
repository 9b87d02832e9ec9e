"""Every kind: served exactly, and refused by name if its files deviate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters.adapter_files import BASE, Tensors, base_info, write_adapter
from adapters.kind_files import EMBED, HEAD, O0, Q0, SAMPLES, V1, key
from loraplex_adapters.format.examine import Report, examine, inspect
from loraplex_adapters.format.spec import AdapterLimits, CheckedAdapter, ModuleSpec

from adapters import folded_files


def judged(
    directory: Path, name: str, config: dict[str, Any] | None = None, **shapes: Any
) -> Report:
    """The report on a sample with changes; a shape of None removes a tensor."""
    sound, tensors = SAMPLES[name]
    changed: Tensors = dict(tensors)
    for tensor, shape in shapes.get("shapes", {}).items():
        if shape is None:
            del changed[tensor]
        else:
            changed[tensor] = np.zeros(shape, np.float32)
    merged = {k: v for k, v in {**sound, **(config or {})}.items() if v is not ...}
    return examine(write_adapter(directory, merged, changed), shapes.get("base", BASE))


def served(directory: Path, name: str, **changes: Any) -> CheckedAdapter:
    report = judged(directory, name, changes or None)
    assert report.spec is not None, report.findings
    return report.spec


def at(spec: CheckedAdapter, site: tuple[int, str]) -> ModuleSpec:
    return next(m for m in spec.modules if (m.layer, m.module) == site)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_is_served(name: str, tmp_path: Path) -> None:
    spec = served(tmp_path, name)
    assert spec.peft_type == SAMPLES[name][0]["peft_type"]
    sites = [(m.layer, m.module) for m in spec.modules]
    assert len(set(sites)) == len(sites)
    assert spec.packed_bytes % 64 == 0
    assert spec.provenance == {"peft_version": "0.21.2"}


PACKED = {
    # 2 ranks: 64 + 64 elements
    "lora": 256 + 256,
    "alora": 256 + 256,
    # and a gain and a bias of 32
    "dora": 256 + 256 + 128 + 128,
    # one bias for two of q_proj, then q, k, v of both layers without A and B
    "lora-bias": 256 + 256 + 128 + 128 + 4 * 64,
    "lora-embeddings": 2 * (320 + 256) + 192 + 40 * 128,  # the copy is not the base's
    # q_norm twice, the head, and two rows
    "lora-saved": 512 + 2 * 64 + (192 + 5120) + (64 + 256),
    "adalora": 384 + 384,
    "ia3": 2 * (64 + 192),
    "beft": 2 * 128,
    "norms": 3 * 128,
    "tokens": 64 + 384,
    "prompt": 384,
    "p-tuning": 384,
    "prefix": 2 * 384,
    "cpt": 384,
    "multitask": 384,
    "cartridge": 2 * 384,
    "bottleneck": 2 * 512 + 64 + 128 + 2 * 768,
    **folded_files.PACKED,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_packed_size_is_known_beforehand(name: str, tmp_path: Path) -> None:
    assert served(tmp_path, name).packed_bytes == PACKED[name]
    limit = AdapterLimits(max_device_bytes=PACKED[name] - 1)
    assert examine(tmp_path, BASE, limit).findings[0].reason == "ADAPTER_TOO_LARGE"
    half = inspect(tmp_path, replace(BASE, dtype="bfloat16"), replace(limit, max_device_bytes=None))
    assert half.packed_bytes <= PACKED[name]


def test_a_bottleneck_says_what_it_reads(tmp_path: Path) -> None:
    spec = served(tmp_path, "bottleneck")
    mlp = at(spec, (0, "mlp_bottleneck"))
    assert (mlp.rank, mlp.scale, mlp.activation, mlp.reads) == (4, 0.5, "gelu", "output")
    assert set(mlp.tensors) == {"down", "down_bias", "up", "up_bias"}
    assert at(spec, (1, "attention_bottleneck")).rank == 6
    linear = served(tmp_path, "bottleneck", non_linearity="linear", reads="stream")
    assert at(linear, (0, "mlp_bottleneck")).activation == "none"


def test_both_tied_matrices_change_with_trained_tokens(tmp_path: Path) -> None:
    tied = base_info(tie_embeddings=True)
    for name in ("tokens", "lora-saved"):
        config = {"modules_to_save": None}
        shapes = {
            t: None for t in SAMPLES[name][1] if t.endswith(("lm_head.weight", "norm.weight"))
        }
        report = judged(tmp_path / name, name, config, shapes=shapes, base=tied)
        assert report.spec is not None, report.findings
        assert at(report.spec, EMBED).tensors == at(report.spec, HEAD).tensors


def test_one_module_is_not_changed_in_two_ways(tmp_path: Path) -> None:
    tied = base_info(tie_embeddings=True)
    report = judged(tmp_path, "lora-saved", base=tied)  # the head saved, and changed by tokens
    assert ("ADAPTER_UNSUPPORTED", "lm_head") in {(f.reason, f.field) for f in report.findings}


DOWN = key((0, "mlp_bottleneck"), "bottleneck_down.weight")
DOWN_BIAS = key((0, "mlp_bottleneck"), "bottleneck_down.bias")
UP_BIAS = key((0, "mlp_bottleneck"), "bottleneck_up.bias")
IA3_K = key((0, "k_proj"), "ia3_l")
MASK = "model.layers.0.self_attn.q_proj.lora_E"

WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    # a tensor that the configuration does not ask for, or asks for and misses
    ("dora", {"use_dora": False}, {}, "ADAPTER_INVALID", key(Q0, "lora_magnitude_vector")),
    ("dora", {"bias": "none"}, {}, "ADAPTER_INVALID", key(Q0, "base_layer.bias")),
    ("dora", {"bias": "all"}, {}, "ADAPTER_INVALID", key((0, "k_proj"), "bias")),
    ("lora", {"use_dora": True}, {}, "ADAPTER_INVALID", key(Q0, "lora_magnitude_vector")),
    ("lora", {"lora_bias": True}, {}, "ADAPTER_INVALID", key(Q0, "lora_B.bias")),
    ("lora", {"modules_to_save": ["norm"]}, {}, "ADAPTER_INVALID", key((-1, "norm"), "weight")),
    ("lora", {"modules_to_save": ["n"] * 65}, {}, "ADAPTER_UNSUPPORTED", "modules_to_save"),
    ("lora-bias", {"lora_bias": False}, {}, "ADAPTER_INVALID", key(Q0, "lora_B.bias")),
    ("lora-bias", {"bias": "lora_only"}, {}, "ADAPTER_INVALID", key(V1, "bias")),
    # shapes
    ("dora", {}, {key(Q0, "lora_magnitude_vector"): (31,)}, "BASE_MODEL_MISMATCH", "="),
    ("dora", {}, {key(Q0, "lora_magnitude_vector"): (1, 32)}, "ADAPTER_INVALID", "="),
    ("lora", {"bias": "lora_only"}, {key(O0, "base_layer.bias"): (32,)}, "ADAPTER_INVALID", "="),
    ("lora-embeddings", {}, {key(EMBED, "lora_embedding_A"): (2, 41)}, "BASE_MODEL_MISMATCH", "="),
    (
        "lora-embeddings",
        {},
        {key(EMBED, "base_layer.weight"): (41, 32)},
        "BASE_MODEL_MISMATCH",
        "=",
    ),
    ("lora-saved", {}, {key(HEAD, "weight"): (48, 32)}, "BASE_MODEL_MISMATCH", "="),
    ("norms", {}, {key((-1, "norm"), "ln_tuning_layers.weight"): (8,)}, "BASE_MODEL_MISMATCH", "="),
    ("ia3", {}, {IA3_K: (1, 16)}, "BASE_MODEL_MISMATCH", "="),
    ("ia3", {}, {IA3_K: (1, 32)}, "ADAPTER_INVALID", "feedforward_modules"),
    ("ia3", {}, {IA3_K: (16,)}, "ADAPTER_INVALID", "="),
    ("beft", {}, {key(O0, "beft_bias"): (32,)}, "ADAPTER_INVALID", "="),
    ("prefix", {}, {"prompt_embeddings": (3, 32)}, "BASE_MODEL_MISMATCH", "="),
    ("prompt", {}, {"prompt_embeddings": (4, 32)}, "ADAPTER_INVALID", "num_virtual_tokens"),
    ("prompt", {}, {"prompt_embeddings": (0, 32)}, "ADAPTER_INVALID", "num_virtual_tokens"),
    ("bottleneck", {}, {DOWN: (0, 32)}, "ADAPTER_INVALID", DOWN_BIAS),
    ("bottleneck", {}, {DOWN: (257, 32)}, "ADAPTER_INVALID", DOWN_BIAS),
    ("bottleneck", {}, {DOWN: None}, "ADAPTER_INVALID", DOWN),
    ("bottleneck", {}, {UP_BIAS: (31,)}, "BASE_MODEL_MISMATCH", "="),
    # strangers
    ("prompt", {}, {"prefix_embeddings": (3, 32)}, "ADAPTER_INVALID", "="),
    ("prompt", {}, {key(Q0, "lora_A.weight"): (3, 32)}, "ADAPTER_INVALID", "="),
    ("ia3", {}, {key(Q0, "lora_A.weight"): (3, 32)}, "ADAPTER_INVALID", "="),
    ("ia3", {}, {key((2, "k_proj"), "ia3_l"): (16, 1)}, "BASE_MODEL_MISMATCH", "="),
    ("beft", {}, {key(HEAD, "beft_bias"): (1, 40)}, "ADAPTER_UNSUPPORTED", "="),
    ("norms", {}, {key(Q0, "ln_tuning_layers.weight"): (32, 32)}, "ADAPTER_UNSUPPORTED", "="),
    ("bottleneck", {}, {key(Q0, "bottleneck_up.bias"): (32,)}, "ADAPTER_INVALID", "="),
    # options
    ("lora-bias", {"use_dora": True}, {}, "ADAPTER_UNSUPPORTED", "lora_bias"),
    ("adalora", {"lora_alpha": 0}, {}, "ADAPTER_UNSUPPORTED", "lora_alpha"),
    ("adalora", {"init_r": 0}, {}, "ADAPTER_INVALID", "init_r"),
    ("adalora", {"init_r": 5}, {}, "ADAPTER_INVALID", "rank_pattern"),
    ("adalora", {"init_r": 300}, {}, "RANK_TOO_LARGE", "init_r"),
    ("adalora", {"rank_pattern": {}}, {}, "ADAPTER_INVALID", "init_r"),
    ("adalora", {"rank_pattern": {MASK: [1, 0, 1, 1]}}, {}, "ADAPTER_INVALID", "rank_pattern"),
    ("adalora", {"rank_pattern": {MASK: 3}}, {}, "ADAPTER_INVALID", "rank_pattern"),
    ("adalora", {"rank_pattern": {"(a+)+.lora_E": []}}, {}, "ADAPTER_INVALID", "rank_pattern"),
    ("adalora", {"rank_pattern": {"x.lora_E": [True] * 4}}, {}, "ADAPTER_INVALID", "rank_pattern"),
    ("adalora", {"use_dora": True}, {}, "ADAPTER_UNSUPPORTED", "use_dora"),
    ("ia3", {"feedforward_modules": ["k_proj"]}, {}, "ADAPTER_INVALID", "feedforward_modules"),
    ("ia3", {"feedforward_modules": 7}, {}, "ADAPTER_INVALID", "feedforward_modules"),
    ("ia3", {"target_modules": ["k_proj"]}, {}, "ADAPTER_INVALID", "target_modules"),
    ("ia3", {"r": 8}, {}, "ADAPTER_UNSUPPORTED", "r"),
    ("norms", {"target_modules": ["norm"]}, {}, "ADAPTER_INVALID", "target_modules"),
    ("tokens", {"token_indices": [39, 0]}, {}, "ADAPTER_INVALID", "token_indices"),
    ("tokens", {"token_indices": [40, 0, 7]}, {}, "BASE_MODEL_MISMATCH", "token_indices"),
    ("tokens", {"token_indices": ...}, {}, "ADAPTER_INVALID", "token_indices"),
    ("tokens", {"target_modules": ["lm_head"]}, {}, "ADAPTER_INVALID", "target_modules"),
    ("prompt", {"num_virtual_tokens": 0}, {}, "ADAPTER_INVALID", "num_virtual_tokens"),
    ("prompt", {"num_virtual_tokens": 2000}, {}, "ADAPTER_TOO_LARGE", "num_virtual_tokens"),
    ("prompt", {"token_dim": 64}, {}, "BASE_MODEL_MISMATCH", "token_dim"),
    ("prompt", {"num_transformer_submodules": 2}, {}, "ADAPTER_UNSUPPORTED", "="),
    ("prompt", {"modules_to_save": ["lm_head"]}, {}, "ADAPTER_UNSUPPORTED", "modules_to_save"),
    ("prefix", {"num_layers": 4}, {}, "BASE_MODEL_MISMATCH", "num_layers"),
    ("prefix", {"num_attention_heads": 4}, {}, "BASE_MODEL_MISMATCH", "num_attention_heads"),
    ("bottleneck", {"bottleneck_size": 5}, {}, "ADAPTER_INVALID", "bottleneck_size"),
    ("bottleneck", {"bottleneck_size": 999}, {}, "RANK_TOO_LARGE", "bottleneck_size"),
    ("bottleneck", {"non_linearity": "mish"}, {}, "ADAPTER_UNSUPPORTED", "non_linearity"),
    ("bottleneck", {"reads": "input"}, {}, "ADAPTER_UNSUPPORTED", "reads"),
    ("bottleneck", {"scaling": 1e9}, {}, "ADAPTER_INVALID", "scaling"),
    ("bottleneck", {"scaling": "learned"}, {}, "ADAPTER_INVALID", "scaling"),
    ("bottleneck", {"placements": ["mlp"]}, {}, "ADAPTER_INVALID", "placements"),
    ("bottleneck", {"placements": ["mlp", "head"]}, {}, "ADAPTER_UNSUPPORTED", "placements"),
    ("bottleneck", {"use_gating": True}, {}, "ADAPTER_UNSUPPORTED", "use_gating"),
]


@pytest.mark.parametrize(("name", "config", "shapes", "reason", "field"), WRONG)
def test_what_does_not_fit_is_refused_by_its_name(
    name: str,
    config: dict[str, Any],
    shapes: dict[str, Any],
    reason: str,
    field: str,
    tmp_path: Path,
) -> None:
    report = judged(tmp_path, name, config, shapes=shapes)
    assert report.spec is None
    expected = next(iter((*shapes, *config))) if field == "=" else field
    assert (reason, expected) in {(f.reason, f.field) for f in report.findings}


def test_an_adapter_of_ranks_zero_alone_is_refused(tmp_path: Path) -> None:
    mask = {"model.layers.1.self_attn.v_proj.lora_E": [False] * 4}
    shapes = {t: None for t in SAMPLES["adalora"][1] if "layers.0" in t}
    report = judged(tmp_path, "adalora", {"rank_pattern": mask}, shapes=shapes)
    assert [f.reason for f in report.findings] == ["ADAPTER_INVALID"]
    assert "changes nothing" in report.findings[0].message


def test_a_bias_that_the_base_does_not_have_is_not_replaced(tmp_path: Path) -> None:
    plain = base_info(qkv_bias=False)
    report = judged(tmp_path, "dora", base=plain)
    assert {f.field for f in report.findings} == {key(Q0, "base_layer.bias")}


def test_stamps_become_provenance(tmp_path: Path) -> None:
    spec = served(
        tmp_path,
        "lora",
        loraplex_trainer="ours",
        loraplex_steps=300,
        loraplex_base_fingerprint=BASE.fingerprint,
        base_model_name_or_path="a/b",
        revision="main",
    )
    assert spec.provenance == {
        "trainer": "ours",
        "steps": "300",
        "base_fingerprint": BASE.fingerprint,
        "base_model_name_or_path": "a/b",
        "peft_version": "0.21.2",
        "revision": "main",
    }
    long = served(tmp_path, "lora", loraplex_note="x" * 5000).provenance["note"]
    assert len(long) == 512


def test_stamps_are_bounded(tmp_path: Path) -> None:
    many = {f"loraplex_{n}": "x" for n in range(65)}
    assert judged(tmp_path, "lora", many).spec is None
