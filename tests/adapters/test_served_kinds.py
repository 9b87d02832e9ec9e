"""Kinds by the served weight and variants of LoRA: what does not fit is refused by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_files import BASE, write_adapter
from adapters.kind_files import SAMPLES
from adapters.peft_files import TIED
from adapters.peft_kinds import Gallery
from adapters.served_files import BANK, HEAD, K0, Q0, key
from adapters.test_kinds import judged, served
from loraplex_adapters.convert.export.exporter import ExportRequest, run
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load import folded
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import ProjectionDelta
from loraplex_model.base.refusal import Refusal

LORA_A, LORA_B, DIAG = (key(Q0, f"lora_{part}") for part in ("A.weight", "B.weight", "diag"))
ENCODER = key(K0, "peanut_encoders.0.weight")
LOGITS = key(K0, "poly_router.module_logits")
COLUMNS = "prefix_task_cols"
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["k_"], "target_modules_bd_b": ["q_proj"]}

WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    # shapes
    ("delora", {}, {key(Q0, "delora_lambda"): (2,)}, "BASE_MODEL_MISMATCH", "="),
    ("delora", {}, {key(Q0, "delora_w_norm"): (31,)}, "BASE_MODEL_MISMATCH", "="),
    ("delora", {}, {key(Q0, "delora_w_norm"): None}, "ADAPTER_INVALID", "="),
    ("delora", {}, {key(Q0, "delora_B"): (32, 4)}, "ADAPTER_INVALID", "="),
    ("delora", {"r": 4}, {}, "ADAPTER_INVALID", "r"),
    ("delora", {"rank_pattern": {}}, {}, "ADAPTER_INVALID", "r"),
    ("delora", {"bias": "none"}, {}, "ADAPTER_INVALID", key(Q0, "base_layer.bias")),
    ("delora", {"bias": "lora_only"}, {}, "ADAPTER_UNSUPPORTED", "bias"),
    ("hra", {}, {key(Q0, "hra_u"): (4, 32)}, "BASE_MODEL_MISMATCH", "="),
    ("hra", {}, {key(Q0, "hra_u"): (32, 0)}, "ADAPTER_INVALID", "="),
    ("hra", {}, {key(Q0, "hra_u"): (32,)}, "ADAPTER_INVALID", "="),
    ("hra", {"r": 5}, {}, "ADAPTER_INVALID", "r"),
    ("hra", {"r": 1 << 40}, {}, "RANK_TOO_LARGE", "r"),
    ("hra", {"r": 300}, {key(Q0, "hra_u"): (32, 300)}, "RANK_TOO_LARGE", "r"),
    ("hra", {"r": "4"}, {}, "ADAPTER_INVALID", "r"),
    ("hra", {"apply_GS": 1}, {}, "ADAPTER_INVALID", "apply_GS"),
    ("hra", {}, {key((-1, "embed_tokens"), "hra_u"): (40, 4)}, "ADAPTER_UNSUPPORTED", "="),
    ("deft", {"r": 19}, {}, "ADAPTER_INVALID", "r"),
    ("deft", {"para": True}, {}, "ADAPTER_INVALID", key(Q0, "deft_R")),
    ("para", {"para": False}, {}, "ADAPTER_INVALID", key(K0, "deft_R")),
    ("deft", {"decomposition_method": "svd"}, {}, "ADAPTER_UNSUPPORTED", "decomposition_method"),
    ("deft", {"alpha": 1e9}, {}, "ADAPTER_INVALID", "alpha"),
    ("peanut", {"depth": 0}, {}, "ADAPTER_INVALID", ENCODER),
    ("peanut", {"depth": 2}, {}, "ADAPTER_INVALID", key(K0, "peanut_encoders.1.weight")),
    ("peanut", {"depth": 10**9}, {}, "ADAPTER_UNSUPPORTED", "depth"),
    ("peanut", {"depth": True}, {}, "ADAPTER_UNSUPPORTED", "depth"),
    ("peanut", {"act_fn": "xielu"}, {}, "ADAPTER_UNSUPPORTED", "act_fn"),
    ("peanut", {"scaling": -1e5}, {}, "ADAPTER_INVALID", "scaling"),
    ("peanut", {}, {ENCODER: (3, 4)}, "ADAPTER_INVALID", "="),
    ("vblora", {"topk": 6}, {}, "ADAPTER_INVALID", "topk"),
    ("vblora", {"topk": 0}, {}, "ADAPTER_INVALID", "topk"),
    ("vblora", {"vector_length": 5}, {}, "BASE_MODEL_MISMATCH", "vector_length"),
    ("vblora", {"num_vectors": 4}, {}, "ADAPTER_INVALID", BANK),
    ("vblora", {"save_only_topk_weights": True}, {}, "ADAPTER_UNSUPPORTED", "="),
    ("vblora", {}, {BANK: None}, "ADAPTER_INVALID", "="),
    ("vblora", {}, {BANK: (5,)}, "ADAPTER_INVALID", "="),
    ("vblora", {}, {key(K0, "vblora_logits_B"): (2, 2, 6)}, "BASE_MODEL_MISMATCH", "="),
    ("pvera", {"sample_at_inference": True}, {}, "ADAPTER_UNSUPPORTED", "="),
    ("pvera", {}, {key(K0, "pvera_lambda_d"): (3,)}, "ADAPTER_INVALID", "r"),
    ("poly", {"n_tasks": 2}, {LOGITS: (2, 10)}, "ADAPTER_UNSUPPORTED", "n_tasks"),
    ("poly", {"n_tasks": 2, "loraplex_task": 1}, {}, "ADAPTER_INVALID", "n_tasks"),
    ("poly", {"n_skills": 4}, {}, "ADAPTER_INVALID", "n_skills"),
    ("poly", {"n_splits": 3}, {}, "BASE_MODEL_MISMATCH", "n_splits"),
    ("poly", {"poly_type": "other"}, {}, "ADAPTER_UNSUPPORTED", "poly_type"),
    ("poly", {"r": 4}, {}, "ADAPTER_INVALID", "r"),
    ("poly", {}, {LOGITS: (1, 9)}, "ADAPTER_INVALID", "n_skills"),
    # variants of LoRA
    ("bd-lora", {"use_bdlora": 2}, {}, "ADAPTER_INVALID", "use_bdlora"),
    ("bd-lora", {"use_bdlora": {**BLOCKS, "nblocks": 0}}, {}, "ADAPTER_INVALID", "use_bdlora"),
    ("bd-lora", {"use_bdlora": {**BLOCKS, "nblocks": 3}}, {}, "ADAPTER_INVALID", "use_bdlora"),
    ("bd-lora", {"use_bdlora": {**BLOCKS, "nblocks": 4}}, {}, "ADAPTER_INVALID", LORA_B),
    ("bd-lora", {"use_bdlora": {**BLOCKS, "other": 1}}, {}, "ADAPTER_UNSUPPORTED", "use_bdlora"),
    (
        "bd-lora",
        {"use_bdlora": {**BLOCKS, "target_modules_bd_a": "q_"}},
        {},
        "ADAPTER_INVALID",
        "use_bdlora",
    ),
    (
        "bd-lora",
        {"use_bdlora": {**BLOCKS, "target_modules_bd_a": ["self_attn"]}},
        {},
        "ADAPTER_INVALID",
        "use_bdlora",
    ),
    (
        "bd-lora",
        {"use_bdlora": {**BLOCKS, "target_modules_bd_b": None}},
        {},
        "ADAPTER_INVALID",
        "use_bdlora",
    ),
    (
        "bd-lora",
        {"use_bdlora": {**BLOCKS, "target_modules_bd_a": ["x"] * 65}},
        {},
        "ADAPTER_UNSUPPORTED",
        "use_bdlora",
    ),
    ("bd-lora", {"use_dora": True}, {}, "ADAPTER_UNSUPPORTED", "use_bdlora"),
    ("bd-lora", {"use_bdlora": None}, {}, "BASE_MODEL_MISMATCH", key(K0, "lora_A.weight")),
    ("kasa", {"kasa_config": True}, {}, "ADAPTER_INVALID", "kasa_config"),
    ("kasa", {"kasa_config": None}, {}, "ADAPTER_INVALID", DIAG),
    ("kasa", {}, {DIAG: None}, "ADAPTER_INVALID", "="),
    ("kasa", {}, {DIAG: (5,)}, "ADAPTER_INVALID", "="),
    ("kasa", {"r": 5}, {}, "ADAPTER_INVALID", "r"),
    ("kasa", {"lora_alpha": 0}, {}, "ADAPTER_UNSUPPORTED", "lora_alpha"),
    ("kasa", {"use_dora": True}, {}, "ADAPTER_UNSUPPORTED", "kasa_config"),
    ("kasa", {"use_bdlora": BLOCKS}, {}, "ADAPTER_UNSUPPORTED", "kasa_config"),
    (
        "kasa",
        {},
        {
            key(HEAD, "lora_A.weight"): (4, 32),
            key(HEAD, "lora_B.weight"): (40, 4),
            key(HEAD, "lora_diag"): (4,),
        },
        "ADAPTER_UNSUPPORTED",
        "lm_head",
    ),
    (
        "kasa",
        {"r": 32},
        {LORA_A: (32, 32), LORA_B: (32, 32), DIAG: (32,)},
        "ADAPTER_INVALID",
        "r",
    ),
    ("qa-lora", {"qalora_group_size": 4}, {}, "BASE_MODEL_MISMATCH", LORA_A),
    ("qa-lora", {"qalora_group_size": 7}, {}, "BASE_MODEL_MISMATCH", "qalora_group_size"),
    ("qa-lora", {"qalora_group_size": -8}, {}, "ADAPTER_INVALID", "qalora_group_size"),
    ("qa-lora", {"use_qalora": False}, {}, "BASE_MODEL_MISMATCH", LORA_A),
    ("qa-lora", {"r": 3}, {}, "ADAPTER_INVALID", "r"),
    ("mica", {"use_dora": True}, {}, "ADAPTER_UNSUPPORTED", "init_lora_weights"),
    ("velora", {"velora_config": None}, {}, "ADAPTER_INVALID", key(Q0, "lora_velora_embed")),
    # tasks
    ("multitask", {"num_tasks": 2}, {COLUMNS: (2, 3, 2)}, "ADAPTER_UNSUPPORTED", "num_tasks"),
    ("multitask", {"num_tasks": 2, "loraplex_task": 1}, {}, "ADAPTER_INVALID", COLUMNS),
    ("multitask", {"num_ranks": 3}, {}, "ADAPTER_INVALID", COLUMNS),
    ("multitask", {"num_ranks": 300}, {}, "RANK_TOO_LARGE", "num_ranks"),
    ("multitask", {"num_tasks": 0}, {}, "ADAPTER_INVALID", "num_tasks"),
    ("multitask", {"loraplex_task": 1}, {}, "ADAPTER_INVALID", "loraplex_task"),
    ("multitask", {"loraplex_task": -1}, {}, "ADAPTER_INVALID", "loraplex_task"),
    ("multitask", {"loraplex_task": "0"}, {}, "ADAPTER_INVALID", "loraplex_task"),
    ("multitask", {"loraplex_task": False}, {}, "ADAPTER_INVALID", "loraplex_task"),
    ("multitask", {}, {COLUMNS: None}, "ADAPTER_INVALID", "="),
    ("cartridge", {"num_virtual_tokens": 2}, {}, "ADAPTER_INVALID", "num_virtual_tokens"),
    ("cpt", {"num_virtual_tokens": 4}, {}, "ADAPTER_INVALID", "num_virtual_tokens"),
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


@pytest.mark.parametrize(
    ("name", "limit", "rank"),
    [("delora", 2, "3"), ("hra", 3, "4"), ("kasa", 7, "8 (2 x 4)"), ("bd-lora", 3, "4")],
)
def test_a_folded_rank_above_the_limit_is_refused_with_the_rank(
    name: str, limit: int, rank: str, tmp_path: Path
) -> None:
    config, tensors = SAMPLES[name]
    report = examine(write_adapter(tmp_path, config, tensors), BASE, AdapterLimits(max_rank=limit))
    assert report.spec is None
    assert {f.reason for f in report.findings} == {"RANK_TOO_LARGE"}
    if name != "bd-lora":
        assert f"folded rank {rank};" in report.findings[-1].message


def test_kasa_that_takes_too_long_to_load_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config, tensors = SAMPLES["kasa"]
    work = 32 * 32 * (32 + 32)
    source = write_adapter(tmp_path, config, tensors)
    assert inspect(source, BASE, AdapterLimits(max_decompositions=work)).rank == 8
    (finding,) = examine(source, BASE, AdapterLimits(max_decompositions=work - 1)).findings
    assert (finding.reason, finding.field) == ("ADAPTER_TOO_LARGE", "kasa_config")
    assert "loraplex-server export --format peft" in finding.message


def test_only_the_named_task_is_read(tmp_path: Path) -> None:
    config, tensors = SAMPLES["multitask"]
    many = {n: np.repeat(t, 3, axis=0) if "task" in n else t for n, t in tensors.items()}
    found = set()
    for task in range(3):
        changed = {**config, "num_tasks": 3, "loraplex_task": task}
        spec = inspect(write_adapter(tmp_path / str(task), changed, many), BASE)
        assert spec.provenance["task"] == str(task)
        (module,) = spec.modules
        columns = module.tensors["task_cols"]
        assert columns.shape == (3, 2)
        assert columns.end - columns.start == 3 * 2 * 4
        found.add(columns.start)
    assert len(found) == 3
    no_task = write_adapter(tmp_path / "none", {**config, "num_tasks": 3}, many)
    (finding,) = examine(no_task, BASE).findings
    assert "loraplex_task" in finding.message


def spoiled(gallery: Gallery, name: str, directory: Path, ending: str, value: Any) -> None:
    """Loads an adapter of the gallery with other values in one tensor."""
    from safetensors.torch import load_file, save_file

    source = gallery.adapter(TIED, name)
    tensors = load_file(source / "adapter_model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith(ending))
    tensors[name] = value(tensors[name]).contiguous()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    text = (source / "adapter_config.json").read_text()
    (directory / "adapter_config.json").write_text(text)
    spec = inspect(directory, gallery.shapes(TIED))
    load(directory, spec.digest, gallery.weights(TIED))


def test_values_that_do_not_fold_are_refused_when_they_are_loaded(
    gallery: Gallery, tmp_path: Path
) -> None:
    cases: list[tuple[str, str, Any]] = [
        ("hra", "hra_u", torch.zeros_like),
        ("hra, orthogonal", "hra_u", torch.zeros_like),
        ("hra, orthogonal", "hra_u", lambda u: u[:, :1].expand_as(u)),
    ]
    for n, (name, ending, value) in enumerate(cases):
        with pytest.raises(Refusal) as refused:
            spoiled(gallery, name, tmp_path / str(n), ending, value)
        assert refused.value.reason == "ADAPTER_INVALID"
        assert "hra_u" in refused.value.message


def test_factors_that_are_not_finite_are_refused(gallery: Gallery) -> None:
    """Values of a file are finite; only products of them can be infinite."""
    spec, _ = gallery.load(TIED, "delora")
    module = next(m for m in spec.modules if m.module == "q_proj")
    tensors = {role: torch.ones(place.shape) for role, place in module.tensors.items()}
    folded.factors(module, tensors, gallery.weights(TIED))
    for role in ("delora_w_norm", "delora_lambda"):
        changed = {**tensors, role: torch.full_like(tensors[role], torch.inf)}
        with pytest.raises(Refusal, match="infinite elements") as refused:
            folded.factors(module, changed, gallery.weights(TIED))
        assert refused.value.reason == "ADAPTER_INVALID"


def test_widths_below_the_rank_are_multiplied_out(tmp_path: Path) -> None:
    spec = served(tmp_path, "deft")
    assert [module.rank for module in spec.modules] == [20, 16]
    assert spec.packed_bytes == inspect(tmp_path, replace(BASE, dtype="float32")).packed_bytes


def test_kasa_folds_once_into_plain_lora_whatever_its_work(
    gallery: Gallery, tmp_path: Path
) -> None:
    request = ExportRequest(
        adapters=(str(gallery.adapter("llama", "kasa")),),
        weights=(),
        format="peft",
        model=str(gallery.checkpoint("llama")),
        cache=tmp_path / "cache",
    )
    out = tmp_path / "out"
    run(request, out, Path, lambda base: None)
    base = gallery.weights("llama")
    spec = inspect(out, base.info, AdapterLimits(max_decompositions=0))
    _, found = load(out, spec.digest, base)
    _, expected = gallery.load("llama", "kasa")
    assert found.sites.keys() == expected.sites.keys()
    for site, change in expected.sites.items():
        again = found.sites[site]
        assert isinstance(change, ProjectionDelta)
        assert isinstance(again, ProjectionDelta)
        assert again.a is not None
        assert change.a is not None
        assert torch.equal(again.a.float(), change.a.float())
        torch.testing.assert_close(again.b, change.b)
