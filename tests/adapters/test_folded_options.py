"""Every pair of values of the options of folded kinds: A and B multiply to what PEFT adds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.adapter_files import llama_path
from adapters.peft_files import TIED, Case, write
from adapters.peft_kinds import Gallery
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.delta import ProjectionDelta, RowsDelta

from model import tiny

pytestmark = pytest.mark.slow

PROJECTIONS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
LISTED, WIDE = [*PROJECTIONS, "lm_head"], r".*layers\.\d+\.(self_attn|mlp)\.[qkvd].*_proj"
TARGETS = {"target_modules": [LISTED, WIDE, "all-linear"]}
LYCORIS: Mapping[str, Sequence[Any]] = {
    **TARGETS,
    "r": [1, 3, 16],
    "alpha": [-3, 0],
    "rank_pattern": [{}, {"k_proj": 2, r"layers\.1\..*down_proj": 5}],
    "alpha_pattern": [{}, {"o_proj": 9, "layers.0.mlp.down_proj": 1}],
    "exclude_modules": [None, ["v_proj"], r".*layers\.2\..*"],
    "use_effective_conv2d": [True],
    "rank_dropout": [0.5],
    "module_dropout": [0.5],
    "modules_to_save": [None, ["norm"]],
}
OPTIONS: dict[str, Mapping[str, Sequence[Any]]] = {
    "LoHaConfig": {**LYCORIS, "init_weights": [True, False]},
    "LoKrConfig": {
        **LYCORIS,
        "init_weights": [True, False, "lycoris"],
        "decompose_both": [False, True],
        "decompose_factor": [-1, 2, 8],
        "rank_dropout_scale": [True],
    },
    "MissConfig": {
        **TARGETS,
        "r": [1, 7, 32],
        "mini_r": [1, 4, 16],
        "init_weights": [True, False, "mini"],
        "bias": ["none", "all", "MiSS_only"],
        "miss_dropout": [0.5],
        "exclude_modules": [None, ["v_proj"], r".*layers\.2\..*"],
    },
    "GraloraConfig": {
        **TARGETS,
        "r": [4, 8, 48],
        "gralora_k": [1, 2, 4],
        "hybrid_r": [0, 1, 5],
        "alpha": [0, 3],
        "bias": ["none", "all", "gralora_only"],
        "gralora_dropout": [0.5],
        "fan_in_fan_out": [True],
        "init_weights": [True, False],
    },
    "RandLoraConfig": {
        **TARGETS,
        "r": [3, 16, 200],
        "randlora_alpha": [0, 3],
        "sparse": [False, True],
        "very_sparse": [False, True],
        "projection_prng_key": [0, 5],
        "bias": ["none", "all", "randlora_only"],
        "randlora_dropout": [0.5],
        "fan_in_fan_out": [True],
        "init_weights": [True, False],
    },
    "VeraConfig": {
        **TARGETS,
        "r": [1, 5, 200],
        "save_projection": [True, False],
        "projection_prng_key": [0, 2**40],
        "d_initial": [1.0],
        "bias": ["none", "all", "vera_only"],
        "vera_dropout": [0.5],
        "fan_in_fan_out": [True],
        "init_weights": [True, False],
        "modules_to_save": [None, ["lm_head"]],
    },
}


def covering(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different options occur together."""
    left = {
        frozenset({(a, i), (b, j)})
        for a, b in combinations(options, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    found = []
    while left:
        chosen = dict(min(left, key=sorted))
        for name in options:
            if name not in chosen:
                met = [
                    sum(frozenset({(name, value), other}) in left for other in chosen.items())
                    for value in range(len(options[name]))
                ]
                chosen[name] = met.index(max(met))
        left -= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        found.append({name: options[name][value] for name, value in chosen.items()})
    return found


CASES = [
    pytest.param(kind, options, id=f"{kind}-{n}")
    for kind, values in OPTIONS.items()
    for n, options in enumerate(covering(values))
]


def test_the_combinations_cover_every_pair() -> None:
    for values in OPTIONS.values():
        chosen = covering(values)
        for a, b in combinations(values, 2):
            found = [(options[a], options[b]) for options in chosen]
            assert all((x, y) in found for x in values[a] for y in values[b])


def change_of(layer: Any) -> torch.Tensor:
    """PEFT's change of a module's weight, [fan_out, fan_in]."""
    if not hasattr(layer, "miss_block"):
        return layer.get_delta_weight("default")
    weight = torch.zeros_like(layer.get_base_layer().weight)
    return layer.get_delta_weight_miss("default", weight)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_and_b_multiply_to_what_peft_adds(
    kind: str, options: dict[str, Any], gallery: Gallery, tmp_path: Path
) -> None:
    write(Case(TIED, kind, options, {}), tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny.build(TIED), tmp_path).base_model.model
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
            expected = change_of(adapted[llama_path(*site)])
            found = change.b.T @ change.a.float()
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
