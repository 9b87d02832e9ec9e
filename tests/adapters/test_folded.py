"""Kinds that fold into A and B: what does not fit, or is too large, is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_files import BASE, SMOLLM, Tensors, base_info, write_adapter
from adapters.folded_files import (
    HEAD,
    K0,
    Q0,
    RANDLORA_A,
    RANDLORA_B,
    SAMPLES,
    VERA_A,
    VERA_B,
    key,
)
from loraplex_adapters.format.examine import Report, examine, inspect
from loraplex_adapters.format.foreign.names import spelling
from loraplex_adapters.format.kinds.folded import FOLDED
from loraplex_adapters.format.modules import PREFIX
from loraplex_adapters.format.spec import AdapterLimits, Fold, ModuleSpec
from loraplex_adapters.load import folded
from torch.utils._python_dispatch import TorchDispatchMode

EMBED = (-1, "embed_tokens")


def judged(
    directory: Path, name: str, config: dict[str, Any], shapes: dict[str, Any], **options: Any
) -> Report:
    """The report on a sample with changes; a shape of None removes a tensor."""
    sound, tensors = SAMPLES[name]
    changed: Tensors = dict(tensors)
    for tensor, shape in shapes.items():
        if shape is None:
            del changed[tensor]
        else:
            changed[tensor] = np.full(shape, 0.5, np.float32)
    merged = {k: v for k, v in {**sound, **config}.items() if v is not ...}
    base = options.pop("base", BASE)
    return examine(write_adapter(directory, merged, changed), base, AdapterLimits(**options))


W1, W2_A, W2_B = (key(Q0, f"lokr_{end}") for end in ("w1", "w2_a", "w2_b"))
H1_A, H1_B, H2_B = (key(Q0, f"hada_{end}") for end in ("w1_a", "w1_b", "w2_b"))
MISS = key(Q0, "miss_block")
GRA_A, GRA_B = key(Q0, "gralora_A"), key(Q0, "gralora_B")
WIDE_A, WIDE_B = (key(Q0, f"gralora_{end}_general.weight") for end in "AB")
LAMBDA, GAMMA = key(K0, "randlora_lambda"), key(K0, "randlora_gamma")
D, B = key(Q0, "vera_lambda_d"), key(Q0, "vera_lambda_b")
INVALID, OTHER_BASE, UNSERVED = "ADAPTER_INVALID", "BASE_MODEL_MISMATCH", "ADAPTER_UNSUPPORTED"

WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    # missing tensors, and tensors that the configuration does not ask for
    ("loha", {}, {H2_B: None}, INVALID, "="),
    ("lokr", {}, {W1: None}, INVALID, f"{W1}_a"),
    ("lokr", {}, {W2_A: None}, INVALID, "="),
    ("lokr", {}, {key(Q0, "lokr_w2"): (8, 8)}, INVALID, W2_A),
    ("miss", {"bias": "none"}, {}, INVALID, key(Q0, "base_layer.bias")),
    ("miss", {"bias": "all"}, {}, INVALID, key(K0, "bias")),
    ("gralora", {"hybrid_r": 0}, {}, INVALID, WIDE_A),
    ("gralora", {}, {WIDE_B: None}, INVALID, "="),
    ("randlora", {}, {GAMMA: None}, INVALID, "="),
    ("randlora", {}, {RANDLORA_B: None}, INVALID, "="),
    ("vera", {}, {VERA_A: None}, INVALID, "="),
    ("vera", {}, {B: None}, INVALID, "="),
    ("vera", {"save_projection": False}, {}, INVALID, VERA_A),
    ("vera-seed", {"save_projection": True}, {}, INVALID, VERA_A),
    ("loha", {}, {"base_model.vera_A": (4, 32)}, INVALID, "="),
    # shapes
    ("loha", {}, {H1_A: (31, 3)}, OTHER_BASE, "="),
    ("loha", {}, {H1_B: (2, 32)}, INVALID, "="),
    ("loha", {}, {H1_B: (3, 32, 1)}, INVALID, "="),
    ("loha", {}, {H1_A: (32, 0), H1_B: (0, 32)}, INVALID, H1_A),
    ("lokr", {}, {W1: (5, 4)}, OTHER_BASE, "="),
    ("lokr", {}, {W1: (1, 32), W2_A: (32, 2), W2_B: (2, 2)}, OTHER_BASE, W1),
    ("lokr", {}, {W1: (4, 0)}, INVALID, "="),
    ("lokr", {}, {W2_B: (3, 8)}, INVALID, "="),
    ("miss", {}, {MISS: (5, 31)}, OTHER_BASE, "="),
    ("miss", {}, {MISS: (4, 32)}, INVALID, "r"),
    ("miss", {"r": 33}, {MISS: (33, 32)}, OTHER_BASE, "r"),
    ("miss", {"r": 4}, {MISS: (8, 4, 4)}, INVALID, MISS),  # as "bat" has it
    ("miss-mini", {}, {MISS: (8, 4)}, INVALID, "mini_r"),
    ("miss-mini", {"mini_r": 5}, {MISS: (8, 5)}, OTHER_BASE, "mini_r"),
    ("miss-mini", {"init_weights": True}, {}, OTHER_BASE, MISS),
    ("gralora", {}, {GRA_B: (2, 4, 15)}, OTHER_BASE, "="),
    ("gralora", {}, {GRA_B: (2, 6, 16)}, INVALID, "="),
    ("gralora", {"gralora_k": 4}, {}, OTHER_BASE, GRA_A),
    ("gralora", {"gralora_k": 3, "r": 3}, {}, OTHER_BASE, "gralora_k"),
    ("gralora", {"hybrid_r": 2}, {}, INVALID, "hybrid_r"),
    ("gralora", {"r": 6}, {}, INVALID, "r"),
    ("randlora", {}, {RANDLORA_B: (33, 4, 5)}, OTHER_BASE, "="),
    ("randlora", {}, {RANDLORA_A: (5, 2, 16)}, OTHER_BASE, "="),
    ("randlora", {}, {key(K0, "randlora_A"): (5, 1, 17)}, OTHER_BASE, "="),
    ("randlora", {}, {key(K0, "randlora_A"): (5, 1, 16)}, INVALID, "="),  # other values
    ("randlora", {}, {LAMBDA: (5, 3), GAMMA: (3, 16)}, INVALID, "r"),
    ("randlora", {"r": 6}, {}, OTHER_BASE, RANDLORA_A),
    ("vera", {}, {VERA_B: (33, 4)}, OTHER_BASE, "="),
    ("vera", {}, {D: (3,)}, INVALID, "r"),
    ("vera", {}, {B: (31,)}, OTHER_BASE, "="),
    # places
    ("loha", {}, {key(EMBED, "hada_w1_a"): (40, 3)}, UNSERVED, "="),
    ("miss", {}, {key((0, "q_norm"), "miss_block"): (5, 8)}, UNSERVED, "="),
    ("miss", {}, {key((2, "q_proj"), "miss_block"): (5, 32)}, OTHER_BASE, "="),
    ("vera", {"target_modules": ["q_proj"]}, {}, INVALID, "target_modules"),
    ("loha", {"target_modules": ["q_proj"]}, {}, OTHER_BASE, "target_modules"),
    ("loha", {"modules_to_save": ["q_proj"]}, {}, INVALID, key(Q0, "weight")),
    # options
    ("loha", {"r": 0}, {}, INVALID, "r"),
    ("loha", {"r": 4}, {}, INVALID, "r"),
    ("loha", {"alpha": ...}, {}, INVALID, "alpha"),
    ("loha", {"alpha": 1e9}, {}, INVALID, "alpha"),
    ("loha", {"alpha_pattern": {"q_proj": 1e9}}, {}, INVALID, "alpha_pattern"),
    ("loha", {"rank_pattern": {"q_proj": 4}}, {}, INVALID, "rank_pattern"),
    ("loha", {"bias": "all"}, {}, UNSERVED, "bias"),
    ("loha", {"use_dora": True}, {}, UNSERVED, "use_dora"),
    ("lokr", {"r": 3}, {}, INVALID, "r"),
    ("miss", {"r": ...}, {}, INVALID, "r"),
    ("miss", {"init_weights": "bat"}, {}, UNSERVED, "init_weights"),
    ("miss", {"init_weights": "wide"}, {}, UNSERVED, "init_weights"),
    ("miss", {"init_weights": 3}, {}, UNSERVED, "init_weights"),
    ("miss", {"bias": "lora_only"}, {}, UNSERVED, "bias"),
    ("miss-mini", {"mini_r": 0}, {}, INVALID, "mini_r"),
    ("gralora", {"r": 5}, {}, INVALID, "r"),
    ("gralora", {"gralora_k": 0}, {}, INVALID, "gralora_k"),
    ("gralora", {"hybrid_r": -1}, {}, INVALID, "hybrid_r"),
    ("gralora", {"alpha": "x"}, {}, INVALID, "alpha"),
    ("gralora", {"exclude_modules": ["k_proj"]}, {}, UNSERVED, "exclude_modules"),
    ("randlora", {"save_projection": False}, {}, UNSERVED, "save_projection"),
    ("randlora", {"randlora_alpha": None}, {}, INVALID, "randlora_alpha"),
    ("vera-seed", {"projection_prng_key": 1.5}, {}, INVALID, "projection_prng_key"),
    ("vera-seed", {"projection_prng_key": True}, {}, INVALID, "projection_prng_key"),
    ("vera-seed", {"r": 10**9}, {}, "RANK_TOO_LARGE", "r"),
    ("vera-seed", {"r": 257}, {D: (257,)}, "RANK_TOO_LARGE", "r"),
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
    report = judged(tmp_path, name, config, shapes)
    assert report.spec is None
    expected = next(iter((*shapes, *config))) if field == "=" else field
    assert (reason, expected) in {(f.reason, f.field) for f in report.findings}


@pytest.mark.parametrize("name", SAMPLES)
def test_no_value_may_be_nan(name: str, tmp_path: Path) -> None:
    config, tensors = SAMPLES[name]
    for tensor, values in tensors.items():
        spoilt = values.copy()
        spoilt.flat[-1] = np.nan
        source = write_adapter(tmp_path / tensor, config, {**tensors, tensor: spoilt})
        report = examine(source, BASE)
        assert tensor in {f.field for f in report.findings}, tensor
        assert {f.reason for f in report.findings} == {INVALID}


FOLDED_RANKS = {
    "loha": (9, "9 (3 x 3)"),
    "lokr": (8, "8 (4 x 2)"),
    "miss": (5, "5"),
    "miss-mini": (2, "2"),
    "gralora": (11, "11 (2 x 4 + 3)"),
    "randlora": (16, "16"),
}


@pytest.mark.parametrize("name", FOLDED_RANKS)
def test_the_folded_rank_is_limited(name: str, tmp_path: Path) -> None:
    rank, named = FOLDED_RANKS[name]
    report = judged(tmp_path, name, {}, {}, max_rank=rank)
    assert report.spec is not None
    assert report.spec.rank == rank
    (finding,) = judged(tmp_path / "less", name, {}, {}, max_rank=rank - 1).findings
    assert finding.reason == "RANK_TOO_LARGE"
    what = f"has folded rank {named}; at most {rank - 1} is allowed"
    assert finding.message.endswith(what)


def test_the_largest_folded_rank_is_that_of_16_times_16(tmp_path: Path) -> None:
    def of(r: int) -> dict[str, Any]:
        return {
            key(Q0, f"hada_{w}_{side}"): (576, r) if side == "a" else (r, 576)
            for w in ("w1", "w2")
            for side in "ab"
        }

    assert judged(tmp_path / "16", "loha", {"r": 16}, of(16), base=SMOLLM).spec is not None
    (finding,) = judged(tmp_path / "17", "loha", {"r": 17}, of(17), base=SMOLLM).findings
    assert "folded rank 289 (17 x 17); at most 256 is allowed" in finding.message
    (finding,) = judged(tmp_path / "32", "loha", {"r": 32}, of(32), base=SMOLLM).findings
    assert "folded rank 576; at most 256 is allowed" in finding.message


def test_zero_alpha_is_no_change_as_in_peft(tmp_path: Path) -> None:
    for name in ("loha", "lokr", "gralora"):
        report = judged(tmp_path / name, name, {"alpha": 0}, {})
        assert report.spec is not None
        assert [m.scale for m in report.spec.modules if m.fold] == [0.0]


def test_the_head_can_be_a_target(tmp_path: Path) -> None:
    shapes = dict.fromkeys(SAMPLES["miss"][1]) | {key(HEAD, "miss_block"): (5, 40)}
    report = judged(tmp_path, "miss", {"target_modules": ["lm_head"]}, shapes)
    assert report.spec is not None, report.findings
    assert report.spec.packed_bytes == 5 * 32 * 4 + (5 * 40 * 4 + 32)  # padded


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


BOMBS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "loha": (
        "loha",
        {
            "hada_w1_a": (32, 900),
            "hada_w1_b": (900, 48),
            "hada_w2_a": (32, 900),
            "hada_w2_b": (900, 48),
        },
    ),
    "lokr": (
        "lokr",
        {
            "lokr_w1_a": (4, 900),
            "lokr_w1_b": (900, 6),
            "lokr_w2_a": (8, 900),
            "lokr_w2_b": (900, 8),
        },
    ),
    "miss": ("miss", {"miss_block": (48, 32)}),
    "miss, few columns": ("miss", {"miss_block": (48, 16)}),
    "gralora": ("gralora", {"gralora_A": (16, 3, 960), "gralora_B": (16, 960, 2)}),
    "randlora": (
        "randlora",
        {
            "randlora_A": (900, 1, 32),
            "randlora_B": (48, 1, 900),
            "randlora_lambda": (900, 1),
            "randlora_gamma": (1, 32),
        },
    ),
}
"""Tensors of a module [32, 48] whose product, taken literally, would have huge factors."""


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_larger_than_the_tensors_and_the_change_is_computed(name: str) -> None:
    arithmetic, shapes = BOMBS[name]
    random = torch.Generator().manual_seed(0)
    tensors = {role: torch.randn(shape, generator=random) for role, shape in shapes.items()}
    rank = min(16 if name == "miss, few columns" else 32, 32)
    module = ModuleSpec(0, "x", {}, rank, 0.5, fold=Fold(arithmetic, 48, 32))
    base: Any = None
    with Largest() as largest:
        a, b = folded.factors(module, tensors, base)
    assert (a.shape, b.shape) == ((rank, 48), (rank, 32))
    assert largest.elements <= max(48 * 48, *(tensor.numel() for tensor in tensors.values()))


OWN = (".hada_", ".lokr_", ".miss_", ".gralora_", ".randlora_", ".vera_")
NAMES = {name for _, tensors in SAMPLES.values() for name in tensors if name.startswith(PREFIX)}


@pytest.mark.parametrize("name", sorted(n for n in NAMES if any(own in n for own in OWN)))
def test_names_may_contain_the_adapters_name_and_are_known_by_it(name: str) -> None:
    stem, ending = (name[:-7], ".weight") if name.endswith(".weight") else (name, "")
    for spelt, adapter in ((name, ""), (f"{stem}.default{ending}", "default")):
        found = spelling(spelt)
        assert found is not None
        assert (found.name, found.adapter) == (name, adapter)


def test_every_kind_has_a_sample() -> None:
    found = {config["peft_type"] for config, _ in SAMPLES.values()}
    assert found == {kind.peft_type for kind in FOLDED} | {"LORA"}  # and variants of LoRA


def test_shared_tensors_are_read_for_every_module(tmp_path: Path) -> None:
    config, tensors = SAMPLES["vera"]
    spec = inspect(write_adapter(tmp_path, config, tensors), base_info())
    assert {m.tensors["vera_A"].name for m in spec.modules} == {VERA_A}
    assert {m.tensors["vera_B"].name for m in spec.modules} == {VERA_B}
