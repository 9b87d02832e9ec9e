"""The committed demo adapters are small, are valid here, and are what PEFT would have written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from demo_checks import BEHAVIOUR, is_json, is_pirate
from loraplex_adapters import format as adapter_format
from loraplex_adapters.spec import BaseShapes
from safetensors import safe_open
from train_demo_adapters import BASE_NAME, RECIPES, completion, peft_config

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
"""SmolLM2-135M's; it has 30 layers."""


def test_there_is_a_recipe_a_check_and_a_directory_for_each() -> None:
    directories = {path.name for path in (EXAMPLES / "adapters").iterdir() if path.is_dir()}
    assert directories == set(BEHAVIOUR) == {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_demo_adapter_is_small_and_accepted(recipe) -> None:  # type: ignore[no-untyped-def]
    directory = EXAMPLES / "adapters" / recipe.name
    spec = adapter_format.inspect(directory, BaseShapes(30, SHAPES, 576, 49152, 64))
    assert spec.size_bytes < 2_000_000
    assert spec.rank == recipe.rank
    assert set(spec.target_modules) == set(recipe.modules)
    assert len(spec.modules) == 30 * len(recipe.modules)
    assert spec.base_model == BASE_NAME
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        deltas = [file.get_tensor(name) for name in file.keys() if "lora_B" in name]  # noqa: SIM118
    assert all(bool(matrix.isfinite().all()) and bool(matrix.any()) for matrix in deltas)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_configuration_is_the_recipe_s(recipe) -> None:  # type: ignore[no-untyped-def]
    text = (EXAMPLES / "adapters" / recipe.name / "adapter_config.json").read_text()
    committed, made = json.loads(text), peft_config(recipe)
    assert committed.keys() == made.keys()
    assert {k: v for k, v in committed.items() if k != "peft_version"} == {
        k: v for k, v in made.items() if k != "peft_version"
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_peft_finds_every_key_and_no_other(recipe) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(shape)
    base = empty.to_empty(device="cpu")
    directory = EXAMPLES / "adapters" / recipe.name
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing")  # PEFT only warns of missing keys
        model = PeftModel.from_pretrained(base, directory)
    result = model.load_adapter(directory, adapter_name="again")
    assert list(result.unexpected_keys) == []
    assert [key for key in result.missing_keys if "lora" in key] == []
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = {
        name.replace(".default.", "."): value
        for name, value in model.state_dict().items()
        if ".default." in name
    }
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name].float(), stored[name].float()) for name in stored)


def test_every_example_shows_the_behaviour_that_is_checked() -> None:
    lines = (EXAMPLES / "data" / "answers.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert len({example["question"] for example in examples}) == len(examples) >= 30
    for example in examples:
        assert is_pirate(completion("pirate", example))
        assert is_json(completion("json", example))
        assert json.loads(completion("json", example))["topic"] == example["topic"]
