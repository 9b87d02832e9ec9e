"""Files that PEFT writes are read tensor by tensor, for every kind; the rest is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peft
import pytest
from adapters.peft_files import EMBED, HEAD, base_info, lora, write
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.format.header import read_header
from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.kinds.variants import TRAINING_ENDINGS
from loraplex_adapters.format.support import COMMON, UNSERVED

from adapters import folded_cases, peft_files

COPIES = ("base_layer.weight", "_proj.randlora_A", "_proj.randlora_B")
UNUSED = (*COPIES, *TRAINING_ENDINGS)
CASES = {**peft_files.CASES, **folded_cases.CASES}


Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The directory of a case, written once."""
    root = tmp_path_factory.mktemp("peft")
    return cache(lambda name: write(CASES[name], root / name.replace(" ", "-")))


@pytest.mark.parametrize("name", CASES)
def test_what_peft_writes_is_placed_whole(name: str, written: Written) -> None:
    case = CASES[name]
    source = written(name)
    spec = inspect(source, base_info(case.variant))
    first = {(m.layer, m.module): set(m.tensors) for m in spec.modules if m.layer in (0, -1)}
    assert first == {site: set(roles.split()) for site, roles in case.sites.items()}
    data = (source / "adapter_model.safetensors").read_bytes()
    header = read_header(lambda at, n: data[at : at + n], len(data))
    placed = {t for m in spec.modules for t in m.tensors.values()}
    # Of a task's factors there is one slice for each task.
    parts = {t.name for t in placed if case.task is not None and t not in header.tensors}
    left = {t for t in header.tensors if t not in placed and t.start < t.end}
    assert all(t.name.endswith(UNUSED) or t.name in parts for t in left)


@pytest.mark.parametrize("name", CASES)
def test_every_key_that_peft_writes_is_in_the_tables(name: str, written: Written) -> None:
    config = json.loads((written(name) / "adapter_config.json").read_text())
    kind = KINDS[config["peft_type"]]
    assert set(config) - set(CASES[name].added) == set(COMMON) | set(kind.options)


def test_every_type_of_peft_is_served_or_refused_by_name() -> None:
    assert {t.value for t in peft.PeftType} == set(KINDS) - {"BOTTLENECK"} | set(UNSERVED)
    assert not KINDS.keys() & UNSERVED.keys()


def test_trained_rows_keep_the_order_of_their_tokens(written: Written) -> None:
    spec = inspect(written("tied tokens"), base_info(CASES["tied tokens"].variant))
    rows = {m.module: m for m in spec.modules if "rows" in m.tensors}
    assert rows.keys() == {"embed_tokens", "lm_head"}
    assert all(m.token_ids == (5, 3) for m in rows.values())
    assert rows["embed_tokens"].tensors == rows["lm_head"].tensors


def test_adalora_is_scaled_by_the_rank_that_training_began_with(written: Written) -> None:
    case = CASES["adalora, pruned"]
    spec = inspect(written("adalora, pruned"), base_info(case.variant))
    ranks = [(m.rank, m.scale) for m in spec.modules if m.module == "q_proj"]
    assert ranks == [(rank, 8 / (4 + 1e-5)) for rank in (2, 3, 3)]
    assert all(set(m.tensors) == {"bias"} for m in spec.modules if m.module == "v_proj")


def test_virtual_tokens_are_counted(written: Written) -> None:
    for name in ("prompt", "p-tuning", "prefix"):
        case = CASES[name]
        spec = inspect(written(name), base_info(case.variant))
        assert (spec.virtual_tokens, spec.target_modules, spec.rank) == (5, (), 0)


REFUSED = {
    "DoRA on the head": (
        lora("llama", {}, target_modules=["lm_head"], use_dora=True),
        "ADAPTER_UNSUPPORTED",
        "base_model.model.lm_head.lora_magnitude_vector",
    ),
    "DoRA on the embeddings": (
        lora("llama", {}, target_modules=["embed_tokens"], use_dora=True),
        "ADAPTER_UNSUPPORTED",
        "base_model.model.model.embed_tokens.lora_magnitude_vector",
    ),
    "a projection saved whole": (
        lora("llama", {}, modules_to_save=["o_proj"]),
        "ADAPTER_UNSUPPORTED",
        "base_model.model.model.layers.0.self_attn.o_proj.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_the_tensor(name: str, tmp_path: Path) -> None:
    case, reason, field = REFUSED[name]
    report = examine(write(case, tmp_path), base_info(case.variant))
    assert (reason, field) in {(f.reason, f.field) for f in report.findings}


@pytest.mark.parametrize("name", ["tied head", "bias all", "saved norms", "prefix", "ia3", "norms"])
def test_no_other_base_takes_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    report = examine(write(case, tmp_path), base_info("llama-odd-sizes"))
    assert report.spec is None
    assert {f.reason for f in report.findings} <= {"BASE_MODEL_MISMATCH", "ADAPTER_INVALID"}
    assert "BASE_MODEL_MISMATCH" in {f.reason for f in report.findings}


def test_copies_of_the_base_have_to_be_of_this_base(tmp_path: Path) -> None:
    source = write(CASES["embeddings and head"], tmp_path)
    assert {(m.layer, m.module) for m in inspect(source, base_info("llama")).modules} == {
        EMBED,
        HEAD,
    }
    report = examine(source, base_info("llama-odd-sizes"))
    copies = {f.field for f in report.findings if f.field.endswith(COPIES)}
    assert len(copies) == 2
