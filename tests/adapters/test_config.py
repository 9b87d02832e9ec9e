"""Configurations: every option is served exactly or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters.adapter_files import (
    BASE,
    SMOLLM,
    everywhere,
    llama_path,
    lora_config,
    lora_tensors,
    write_adapter,
)
from hypothesis import given
from hypothesis import strategies as st
from loraplex_adapters.format.config import parse_config
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.format.kinds import KINDS
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.format.strict_json import loads
from loraplex_adapters.format.support import Support
from loraplex_model.base.config import PROJECTIONS
from loraplex_model.base.refusal import Refusal

UNSUPPORTED = sorted(k for k, o in KINDS["LORA"].options.items() if o.support is Support.REFUSED)

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"r: 4",
    "an array": b"[]",
    "not UTF-8": b'{"r": "\xff"}',
    "UTF-16": '{"r": 4}'.encode("utf-16"),
    "NaN": b'{"r": 4, "lora_alpha": NaN}',
    "Infinity": b'{"lora_alpha": -Infinity}',
    "a number beyond float64": b'{"lora_alpha": 1e400}',
    "duplicate key": b'{"r": 8, "r": 999999}',
    "duplicate key further in": b'{"rank_pattern": {"a": 1, "a": 2}}',
    "5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "20 digits": b'{"r": ' + b"9" * 20 + b"}",
    "deep lists": b"[" * 30_000 + b"]" * 30_000,
    "deep maps": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "trailing text": b'{"r": 4} x',
}

WRONG: list[tuple[str, Any, str]] = [
    *(("r", r, "ADAPTER_INVALID") for r in (0, -1, 1.0, 4.5, True, "4", None, ..., [4])),
    ("r", 2**31, "RANK_TOO_LARGE"),
    ("r", 257, "RANK_TOO_LARGE"),
    *(("lora_alpha", a, "ADAPTER_INVALID") for a in (None, ..., "8", True, [8], 1e308, 1e6, -1e6)),
    ("rank_pattern", {"q_proj": 0}, "ADAPTER_INVALID"),
    ("rank_pattern", {"q_proj": True}, "ADAPTER_INVALID"),
    ("rank_pattern", {"q_proj": 100_000}, "RANK_TOO_LARGE"),
    ("rank_pattern", {"q_proj": 5}, "ADAPTER_INVALID"),
    ("rank_pattern", ["q_proj"], "ADAPTER_INVALID"),
    ("rank_pattern", {r"(.*a){3000}": 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {r"(.|.|.)*" * 300: 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {r"(?<=mlp\.)up_proj": 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {r"(.)\1": 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {"q_proj|v_proj": 5}, "ADAPTER_INVALID"),
    ("rank_pattern", {"a" + "|" * n: 4 for n in range(1, 300)}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {"": 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {"q_proj\n": 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {"q" * 65_000: 4}, "ADAPTER_UNSUPPORTED"),
    ("rank_pattern", {f"a.x{n}": 4 for n in range(300)}, "ADAPTER_UNSUPPORTED"),
    ("alpha_pattern", {"q_proj": "8"}, "ADAPTER_INVALID"),
    ("alpha_pattern", {"q_proj": 1e300}, "ADAPTER_INVALID"),
    ("alpha_pattern", {"q_proj": 1, "self_attn.q_proj": 2}, "ADAPTER_UNSUPPORTED"),
    ("alpha_pattern", {"self.attn.q_proj": 1, "q_proj": 2}, "ADAPTER_UNSUPPORTED"),
    ("alpha_pattern", {"q_proj": 1, r".*\.(q|v)_proj": 2}, "ADAPTER_UNSUPPORTED"),
    ("exclude_modules", r".*(?P=x)_proj", "ADAPTER_UNSUPPORTED"),
    ("target_modules", r".*(?i:Q)_proj", "ADAPTER_UNSUPPORTED"),
    ("target_modules", r".*\.q_proj", "ADAPTER_INVALID"),
    ("target_modules", r"((((.*)*)*)*)*_proj", "ADAPTER_INVALID"),
    ("exclude_modules", [4], "ADAPTER_INVALID"),
    ("target_modules", [], "ADAPTER_INVALID"),
    ("target_modules", None, "ADAPTER_INVALID"),
    ("target_modules", ["q_proj", 5], "ADAPTER_INVALID"),
    ("target_modules", ["q_proj", "(v+)+_proj"], "ADAPTER_UNSUPPORTED"),
    ("target_modules", ["q_proj"], "ADAPTER_INVALID"),
    ("target_modules", ["q_proj", "v_proj", "o_proj"], "ADAPTER_INVALID"),
    ("layers_to_transform", ["0"], "ADAPTER_INVALID"),
    ("layers_to_transform", -1, "ADAPTER_INVALID"),
    ("layers_to_transform", True, "ADAPTER_INVALID"),
    ("layers_pattern", r"l(a+)+\1yers", "ADAPTER_UNSUPPORTED"),
    ("use_rslora", "yes", "ADAPTER_INVALID"),
    ("base_model_name_or_path", 7, "ADAPTER_INVALID"),
    ("init_lora_weights", 3, "ADAPTER_INVALID"),
    ("init_lora_weights", ["pissa"], "ADAPTER_INVALID"),
    *(
        ("init_lora_weights", name, "ADAPTER_UNSUPPORTED")
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
    ),
    ("bias", "some", "ADAPTER_UNSUPPORTED"),
    ("bias", True, "ADAPTER_UNSUPPORTED"),
    *((key, "yes", "ADAPTER_INVALID") for key in ("use_dora", "lora_bias", "ensure_weight_tying")),
    ("modules_to_save", ["q_(a+)+"], "ADAPTER_UNSUPPORTED"),
    ("modules_to_save", ["score"], "BASE_MODEL_MISMATCH"),
    ("modules_to_save", {"lm_head": 1}, "ADAPTER_INVALID"),
    *(
        ("trainable_token_indices", ids, "ADAPTER_INVALID")
        for ids in ([], "5", [1, 1], [-1], [True], [1.0], 5, {"embed_tokens": [3, 3]})
    ),
    ("trainable_token_indices", {"shared": [1]}, "ADAPTER_UNSUPPORTED"),
    (
        "trainable_token_indices",
        {"embed_tokens": [1], "model.embed_tokens": [1]},
        "ADAPTER_INVALID",
    ),
    ("peft_type", "FOURIERFT", "ADAPTER_UNSUPPORTED"),
    ("peft_type", "NEW", "ADAPTER_UNSUPPORTED"),
    ("peft_type", ..., "ADAPTER_UNSUPPORTED"),
    ("peft_type", ["LORA"], "ADAPTER_UNSUPPORTED"),
    ("task_type", "SEQ_CLS", "ADAPTER_UNSUPPORTED"),
    ("a_new_option", True, "ADAPTER_UNSUPPORTED"),
    ("a_new_option", 0, "ADAPTER_UNSUPPORTED"),
    ("loraplex_base_fingerprint", 5, "ADAPTER_INVALID"),
    ("loraplex_trainer", ["x"], "ADAPTER_INVALID"),
    ("loraplex_base_fingerprint", "sha256:" + "0" * 64, "BASE_MODEL_MISMATCH"),
]

HARMLESS: list[tuple[str, Any]] = [
    ("runtime_config", {"ephemeral_gpu_offload": True}),
    ("lorap_emb_lr", 1e-6),
    ("unsloth_fixed", True),
    ("_name_or_path", "x"),
    ("layers_pattern", r"(?:encoder\.)?layers"),
    ("a_new_option", None),
    ("a_new_option", False),
    ("a_new_option", {}),
    ("a_new_option", ""),
    ("bias", None),
    ("fan_in_fan_out", True),
    ("ensure_weight_tying", True),
    ("loraplex_data_sha256", "abc"),
    ("lora_dropout", 0.9),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "os"}),
    ("inference_mode", False),
    ("exclude_modules", ["k_proj"]),
    ("target_modules", r"((((.*)*)*)*)*[qv]_proj"),
    ("exclude_modules", ["*vision_tower*", "mm-projector"]),
    ("exclude_modules", r".*(vision_tower|audio_tower).*"),
    ("rank_pattern", {"^model.q_proj": 9, "((a)*)*b": 9, "(a+)+$": 9, "a..b": 9}),
    ("layers_pattern", "l(a+)+yers"),
    ("target_modules", "all-linear"),
    ("layers_to_transform", []),
    ("layers_to_transform", [0, 1]),
    ("rank_pattern", {"fc1": 9}),
    ("rank_pattern", None),
    ("lora_alpha", 0),
    ("lora_alpha", -8),
    ("loraplex_base_fingerprint", BASE.fingerprint),
]


@pytest.mark.parametrize("config", BROKEN.values(), ids=BROKEN)
def test_json_with_two_meanings_or_none_is_refused(config: bytes, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, config), BASE)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert refused.value.field == "adapter_config.json"


def test_deep_nesting_is_refused_whatever_stack_is_left() -> None:
    def at_depth(left: int) -> None:
        if left:
            at_depth(left - 1)
        else:
            with pytest.raises(ValueError, match="nested"):
                loads(b"[" * 30_000)

    at_depth(sys.getrecursionlimit() // 2)


@pytest.mark.parametrize(("key", "value", "reason"), WRONG)
def test_a_wrong_option_is_refused_by_its_name(
    key: str, value: Any, reason: str, tmp_path: Path
) -> None:
    report = examine(write_adapter(tmp_path, lora_config(**{key: value})), BASE)
    assert report.spec is None
    assert (reason, key) in {(f.reason, f.field) for f in report.findings}
    assert all(f.message.isascii() and len(f.message) < 600 for f in report.findings)


@pytest.mark.parametrize("key", UNSUPPORTED)
@pytest.mark.parametrize("value", [True, 3, "x", {"a": 1}, [1]])
def test_an_unsupported_option_is_refused_unless_it_is_off(
    key: str, value: object, tmp_path: Path
) -> None:
    _, findings = parse_config(json.dumps(lora_config(**{key: value})).encode())
    assert [(f.reason, f.field) for f in findings] == [("ADAPTER_UNSUPPORTED", key)]
    for off in (None, False, {}, [], ""):
        assert parse_config(json.dumps(lora_config(**{key: off})).encode())[1] == []


@pytest.mark.parametrize(("key", "value"), HARMLESS)
def test_an_option_without_effect_is_no_obstacle(key: str, value: Any, tmp_path: Path) -> None:
    assert inspect(write_adapter(tmp_path, lora_config(**{key: value})), BASE).rank == 4


def test_all_findings_are_reported_at_once(tmp_path: Path) -> None:
    config = lora_config(arrow_config={"top_k": 2}, bias="odd", r=5, layer_replication=[[0, 1]])
    tensors = lora_tensors(everywhere("q_proj", "v_proj"))
    tensors["surprise"] = tensors.popitem()[1]
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, config, tensors), BASE)
    fields = {f.field for f in refused.value.problems}
    assert {"arrow_config", "bias", "layer_replication", "r", "surprise"} <= fields
    first = refused.value.problems[0]
    assert (refused.value.reason, refused.value.message) == (first.reason, first.message)


def test_a_configuration_of_more_than_a_mebibyte_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        inspect(write_adapter(tmp_path, lora_config(revision="x" * (1 << 20))), BASE)
    assert refused.value.reason == "ADAPTER_TOO_LARGE"
    assert refused.value.field == "adapter_config.json"


def test_a_configuration_of_a_thousand_modules_and_all_their_singular_values_is_read(
    tmp_path: Path,
) -> None:
    """AdaLoRA's `rank_pattern` names every singular value of every module."""
    paths = [llama_path(*site) for site in everywhere(*PROJECTIONS, layers=30)]
    kept = {f"{path}.lora_E": [False] * 23 + [n == 0] for n, path in enumerate(paths)}
    config = {"peft_type": "ADALORA", "init_r": 24, "r": 8, "lora_alpha": 48}
    config |= {"target_modules": list(PROJECTIONS), "rank_pattern": kept}
    shapes = SMOLLM.config.projection_shapes()
    tensors = {}
    for n, (layer, name) in enumerate(everywhere(*PROJECTIONS, layers=30)):
        fan_in, fan_out = shapes[name]
        at, rank = f"base_model.model.{llama_path(layer, name)}.lora_", int(n == 0)
        tensors |= {
            f"{at}{end}": np.ones(shape, np.float32)
            for end, shape in (("A", (rank, fan_in)), ("B", (fan_out, rank)), ("E", (rank, 1)))
        }
    source = write_adapter(tmp_path, json.dumps(config, indent=2).encode(), tensors)
    assert 1 << 16 < (source / "adapter_config.json").stat().st_size < 1 << 20
    spec = inspect(source, SMOLLM)
    assert [(m.layer, m.rank) for m in spec.modules] == [(0, 1)]
    assert spec.modules[0].scale == 48 / (24 + 1e-5)


def test_limits_are_the_callers(tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    need = inspect(source, BASE).packed_bytes
    assert inspect(source, BASE, AdapterLimits(max_rank=4, max_device_bytes=need)).rank == 4
    for limits, reason in (
        (AdapterLimits(max_rank=3), "RANK_TOO_LARGE"),
        (AdapterLimits(max_device_bytes=need - 1), "ADAPTER_TOO_LARGE"),
        (AdapterLimits(max_weights_bytes=1000), "ADAPTER_TOO_LARGE"),
        (AdapterLimits(max_scale=1.9), "ADAPTER_INVALID"),
        (AdapterLimits(max_abs_value=0.5), "ADAPTER_INVALID"),
    ):
        with pytest.raises(Refusal) as refused:
            inspect(source, BASE, limits)
        assert refused.value.reason == reason


TEXT = st.text("aq_.*(+)@ \n\0é\u2028\ud800", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(lora_config()) + sorted(UNSUPPORTED)), JSON))
def test_no_value_of_any_key_raises_anything_but_findings(changes: dict[str, Any]) -> None:
    settings, findings = parse_config(json.dumps({**lora_config(), **changes}).encode())
    assert settings is not None or findings


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_findings(data: bytes) -> None:
    settings, findings = parse_config(data)
    assert (settings is None) == bool(findings)
