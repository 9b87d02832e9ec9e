"""The committed demo adapters are small, are valid here, and are what PEFT would have written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from adapters.adapter_files import SMOLLM
from demo_checks import BEHAVIOUR, is_json, is_pirate
from loraplex_adapters.format import examine as adapter_format
from safetensors import safe_open
from train import commands, runs
from train_demo_adapters import BASE_NAME, RECIPES, completion, main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_there_is_a_recipe_a_check_and_a_directory_for_each() -> None:
    directories = {path.name for path in (EXAMPLES / "adapters").iterdir() if path.is_dir()}
    assert directories == set(BEHAVIOUR) == {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_demo_adapter_is_small_and_accepted(recipe) -> None:  # type: ignore[no-untyped-def]
    directory = EXAMPLES / "adapters" / recipe.name
    spec = adapter_format.inspect(directory, SMOLLM)
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
    config = json.loads(text)
    assert (config["r"], config["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == set(recipe.modules)
    assert config["base_model_name_or_path"] == BASE_NAME


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


def test_the_script_trains_both_as_jobs_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
    base = runs.write_base(tmp_path)
    data = tmp_path / "answers.jsonl"
    rows = [{"question": f"{n}?", "topic": "t", "answer": "a", "pirate": "Arr"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model": base, "data": data, "out": tmp_path / "out", "cache": tmp_path / "cache"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--threads", "1"]) == 0
    for recipe in RECIPES:
        folder = tmp_path / "out" / recipe.name
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = set(file.keys())
            assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
            assert file.metadata() == {"format": "pt"}
        assert {name.split(".")[-3] for name in names} == set(recipe.modules)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "model"
        assert recipe.name in (folder / "README.md").read_text()


def test_every_example_shows_the_behaviour_that_is_checked() -> None:
    lines = (EXAMPLES / "data" / "answers.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    assert len({example["question"] for example in examples}) == len(examples) >= 30
    for example in examples:
        assert is_pirate(completion("pirate", example))
        assert is_json(completion("json", example))
        assert json.loads(completion("json", example))["topic"] == example["topic"]
