"""Blends: cat equals the server's mix, the others equal PEFT's, and PEFT loads all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.adapter_files import everywhere
from adapters.export_bases import PROMPT, Bases, agree, rows
from adapters.peft_files import CASES, lora, write
from loraplex_adapters.convert.export.base import LIMITS, open_adapter
from loraplex_adapters.convert.export.blend import (
    BlendMethod,
    BlendSpec,
    blend,
    concatenated,
    dare,
    ties,
    truncated,
)
from loraplex_adapters.convert.export.factors import Factors, delta_of, factors_of
from loraplex_adapters.convert.export.peft_files import write_peft
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.modules import EMBEDDING, ModulePaths
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.config import MODEL
from loraplex_model.base.families import tensor_name
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.load import LoadedBase
from model.changes import random_adapter
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

ALL = "all-linear"
NAMES = {
    "rsLoRA": lora("llama", {}, r=3, lora_alpha=5, use_rslora=True, target_modules=ALL),
    "patterns": lora(
        "llama",
        {},
        r=2,
        target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"],
        rank_pattern={"down_proj": 7},
        alpha_pattern={"q_proj": 3},
    ),
    "adalora": CASES["adalora"],
}
WEIGHTS = (0.7, -0.4, 1.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapters(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterDelta]:
    root = tmp_path_factory.mktemp("adapters")
    base = bases("llama")
    return [
        open_adapter(write(case, root / name, seed=i), base)[1]
        for i, (name, case) in enumerate(NAMES.items())
    ]


def peft_logits(base: LoadedBase, directory: Path) -> torch.Tensor:
    """PEFT's logits with an adapter on the weights as they are served."""
    from loraplex_adapters.convert.export.parameters import merged_form, parameters

    model = AutoModelForCausalLM.from_pretrained(base.source).eval()
    nothing = AdapterDelta()
    for parameter in parameters(base.weights, nothing, merged_form(base.weights.config, nothing)):
        model.get_parameter(parameter.name).data.copy_(parameter.base())
    config = peft.PeftConfig.from_pretrained(directory)
    wrapped = peft.get_peft_model(model, config)
    loaded = wrapped.load_adapter(directory, "blend")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key and ".blend" in key]
    wrapped.set_adapter("blend")
    with torch.no_grad():
        found: torch.Tensor = wrapped(torch.tensor([PROMPT])).logits[0]
    return found


def random_factors(rank: int, fan_in: int, out: int, seed: int) -> Factors:
    random = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, fan_in, generator=random), torch.randn(out, rank, generator=random)
    )


@pytest.mark.filterwarnings("ignore")
def test_cat_is_the_mix_that_the_server_computes(
    bases: Bases, adapters: list[AdapterDelta], tmp_path: Path
) -> None:
    base = bases("llama")
    parts = [factors_of(delta, base.weights.config, "a blend") for delta in adapters]
    blended = blend(list(zip(parts, WEIGHTS, strict=True)), BlendSpec(BlendMethod.CAT))
    write_peft(tmp_path / "out", blended.factors, ModulePaths(base.weights.info), stamps={})
    spec, delta = open_adapter(tmp_path / "out", base)
    assert spec.rank == max(f.rank for f in blended.factors.values())
    mixed = rows(base, *zip(adapters, WEIGHTS, strict=True))
    agree(rows(base, (delta, 1.0)), mixed, 1e-6)
    agree(peft_logits(base, tmp_path / "out"), mixed)


@pytest.mark.parametrize(
    "recipe",
    [
        BlendSpec(BlendMethod.SVD, rank=5),
        BlendSpec(BlendMethod.TIES, rank=5, density=0.3),
        BlendSpec(BlendMethod.DARE, rank=5, density=0.5, seed=11),
    ],
    ids=lambda recipe: recipe.method.value,
)
@pytest.mark.filterwarnings("ignore")
def test_cut_blends_are_files_that_peft_and_the_server_read_alike(
    recipe: BlendSpec, bases: Bases, adapters: list[AdapterDelta], tmp_path: Path
) -> None:
    base = bases("llama")
    parts = [factors_of(delta, base.weights.config, "a blend") for delta in adapters]
    blended = blend(list(zip(parts, WEIGHTS, strict=True)), recipe)
    write_peft(tmp_path / "out", blended.factors, ModulePaths(base.weights.info), stamps={})
    _, delta = open_adapter(tmp_path / "out", base)
    assert max(f.rank for f in blended.factors.values()) == recipe.rank
    agree(peft_logits(base, tmp_path / "out"), rows(base, (delta, 1.0)))
    again = blend(list(zip(parts, WEIGHTS, strict=True)), recipe)
    for site, found in blended.factors.items():
        assert torch.equal(found.b, again.factors[site].b), "the same recipe, another result"


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_and_dare_are_those_of_peft(density: float, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    deltas = [torch.randn(24, 17, generator=random) for _ in range(count)]
    weights = [0.5, 1.5, -0.25][:count]
    wanted = merge_utils.ties(deltas, torch.tensor(weights), density)
    torch.testing.assert_close(ties(deltas, weights, density), wanted)
    if density < 1:
        torch.manual_seed(7)
        wanted = merge_utils.dare_linear(deltas, torch.tensor(weights), density)
        found = dare(deltas, weights, density, torch.Generator().manual_seed(7))
        torch.testing.assert_close(found, wanted)


def test_svd_is_the_nearest_product_and_says_how_near() -> None:
    parts = [(random_factors(6, 30, 20, 0), 1.0), (random_factors(4, 30, 20, 1), -0.5)]
    dense = sum(f.dense() * w for f, w in parts)
    assert isinstance(dense, torch.Tensor)
    torch.testing.assert_close(concatenated(parts).dense(), dense)
    singular = torch.linalg.svdvals(dense)
    for rank in (1, 4, 9, 10, 30):
        cut, error = truncated(concatenated(parts), rank)
        assert cut.rank == min(rank, 10)
        away = torch.linalg.matrix_norm(cut.dense() - dense) / torch.linalg.matrix_norm(dense)
        best = (singular[rank:].square().sum() / singular.square().sum()).sqrt()
        assert error == pytest.approx(best.item(), abs=1e-4)
        assert error == pytest.approx(away.item(), abs=1e-4)


def test_ranks_that_differ_are_written_so_that_no_two_keys_overlap(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama")
    factors = {
        (0, "q_proj"): random_factors(3, 64, 64, 0),
        (1, "q_proj"): random_factors(3, 64, 64, 1),
        (2, "q_proj"): random_factors(5, 64, 64, 2),
        EMBEDDING: random_factors(2, 128, 64, 3),
        (MODEL, "lm_head"): random_factors(3, 64, 128, 4),
    }
    path, stamps = ModulePaths(base.weights.info), {"loraplex_x": "y"}
    write_peft(tmp_path / "out", factors, path, base_model="some/base", stamps=stamps)
    text = (tmp_path / "out/adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"] == {
        "model.embed_tokens": 2,
        tensor_name("LlamaForCausalLM", 2, "q_proj").removesuffix(".weight"): 5,
    }
    spec = inspect(tmp_path / "out", base.weights.info, LIMITS)
    assert all(module.scale == 1 for module in spec.modules)
    assert dict(spec.provenance)["x"] == "y"
    assert spec.base_model == "some/base"
    agree(
        rows(base, (open_adapter(tmp_path / "out", base)[1], 1.0)),
        rows(base, (delta_of(factors, base.weights.config), 1.0)),
        1e-7,
    )


@pytest.mark.parametrize(
    "kind", ["gains", "biases", "input-gains", "norms", "bottlenecks", "token-rows"]
)
def test_what_a_and_b_cannot_say_is_refused(kind: str, bases: Bases) -> None:
    config = bases("llama").weights.config
    delta = random_adapter(kind, config, seed=0)
    with pytest.raises(Refusal) as refused:
        factors_of(delta, config, "a blend")
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"method": BlendMethod.SVD}, "rank"),
        ({"method": BlendMethod.CAT, "rank": 4}, "rank"),
        ({"method": BlendMethod.SVD, "rank": 0}, "rank"),
        ({"method": BlendMethod.TIES, "rank": 4}, "density"),
        ({"method": BlendMethod.SVD, "rank": 4, "density": 0.5}, "density"),
        ({"method": BlendMethod.DARE, "rank": 4, "density": 0.0}, "density"),
        ({"method": BlendMethod.DARE, "rank": 4, "density": 1.5}, "density"),
    ],
)
def test_a_recipe_says_all_and_nothing_else(options: dict[str, Any], field: str) -> None:
    with pytest.raises(Refusal) as refused:
        blend([], BlendSpec(**options))
    assert (refused.value.reason, refused.value.field) == ("FIELD_INVALID", field)


def test_weights_that_are_no_numbers_are_refused() -> None:
    factors = dict.fromkeys(everywhere("q_proj"), random_factors(2, 32, 32, 0))
    with pytest.raises(Refusal) as refused:
        blend([(factors, float("nan"))], BlendSpec(BlendMethod.CAT))
    assert refused.value.field == "weights"
