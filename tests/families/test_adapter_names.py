"""Adapters by the names and modules of each family's checkpoints, and what is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import adapter_kinds, variants
from families.adapter_bases import Bases, assert_equals, ours, theirs
from gguf import GGUFReader
from loraplex_adapters.convert.export.base import open_adapter, open_base
from loraplex_adapters.convert.export.blend import BlendMethod, BlendSpec, blend
from loraplex_adapters.convert.export.factors import delta_of, factors_of
from loraplex_adapters.convert.export.gguf_adapter import FILE, write_gguf
from loraplex_adapters.convert.export.merged import write_dense, write_nf4
from loraplex_adapters.convert.export.peft_files import write_peft
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.format.modules import ModulePaths
from loraplex_model.adapters.delta import AdapterDelta, ProjectionDelta
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.load import LoadedBase
from model.gguf_files import converted
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

pytestmark = pytest.mark.filterwarnings("ignore")

PREFIX = "base_model.model."


def save(model: Any, directory: Path, *, kind: str = "LoraConfig", **options: Any) -> Any:
    """Saves an adapter with PEFT for a copy of the model; returns the model that has it."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
        found = peft.get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for parameter in found.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        found.create_or_update_model_card = lambda _: None  # takes longer than all the rest
        found.save_pretrained(directory)
    return found.eval()


def rename(directory: Path, change: Callable[[str], str]) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({change(name): t for name, t in load_file(file).items()}, file, {"format": "pt"})


def refusals(directory: Path, base: LoadedBase) -> list[tuple[str, str]]:
    report = examine(directory, base.weights.info)
    assert report.spec is None
    return [(str(found.reason), found.message) for found in report.findings]


# Modules that checkpoints join


@pytest.mark.parametrize(
    ("variant", "named", "found"),
    [
        ("phi3", "q_proj", "divides qkv_proj; this base holds q_proj, k_proj and v_proj as one"),
        ("phi3", "up_proj", "divides gate_up_proj; this base holds gate_proj and up_proj as one"),
        ("glm4", "gate_proj", "divides gate_up_proj"),
        ("gemma2", "qkv_proj", "joins q_proj, k_proj and v_proj; this base holds them as modules"),
        ("olmo2", "gate_up_proj", "joins gate_proj and up_proj"),
    ],
)
def test_an_adapter_of_a_checkpoint_that_joins_other_modules_is_refused_with_the_cause(
    bases: Bases, variant: str, named: str, found: str, tmp_path: Path
) -> None:
    base = bases.ours(variant)
    own = next(name for name in adapter_kinds.names(base.weights.info) if name[0] == "o")
    save(bases.theirs(variant), tmp_path, target_modules=[own], r=2)
    block = "mlp" if "up" in named or "gate" in named else "self_attn"
    rename(tmp_path, lambda name: name.replace(f"self_attn.{own}", f"{block}.{named}"))
    reason, message = refusals(tmp_path, base)[0]
    assert reason == "BASE_MODEL_MISMATCH"
    assert found in message
    assert "serve the checkpoint that the adapter was trained on" in message


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_blend_has_the_modules_of_the_checkpoint(
    bases: Bases, method: str, tmp_path: Path
) -> None:
    base, model = bases.ours("phi3"), bases.theirs("phi3")
    named = [["qkv_proj", "gate_up_proj", "o_proj"], ["qkv_proj", "down_proj"]]
    parts = []
    for turn, targets in enumerate(named):
        save(model, tmp_path / str(turn), target_modules=targets, r=2 + turn)
        _, delta = open_adapter(tmp_path / str(turn), base)
        parts.append(factors_of(delta, base.weights.config, "a blend"))
    recipe = BlendSpec(BlendMethod(method), rank=5 if method == "svd" else None)
    factors = blend(list(zip(parts, (0.7, -0.4), strict=True)), recipe).factors
    assert {name for _, name in factors} == {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"}
    assert factors[0, "qkv_proj"].rank == 5
    write_peft(tmp_path / "out", factors, ModulePaths(base.weights.info), stamps={})
    _, delta = open_adapter(tmp_path / "out", base)
    mixed = model
    with torch.no_grad():
        mixed = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "0", "0")
        mixed.load_adapter(tmp_path / "1", "1")
        mixed.add_weighted_adapter(["0", "1"], [0.7, -0.4], "both", combination_type="cat")
        mixed.set_adapter("both")
    expected = theirs(mixed.eval())
    assert (expected - theirs(model)).abs().max() > 0.1
    assert_equals(ours(base, delta), expected)
    assert_equals(ours(base, delta_of(factors, base.weights.config)), expected)


def test_parts_with_their_own_factors_become_one_product(bases: Bases) -> None:
    config = bases.ours("phi3").weights.config
    random = torch.Generator().manual_seed(0)
    wide, kv = config.hidden_size, config.kv_size
    changes = {
        (1, "q_proj"): ProjectionDelta(
            torch.randn(2, wide, generator=random), torch.randn(2, wide, generator=random)
        ),
        (1, "v_proj"): ProjectionDelta(
            torch.randn(3, wide, generator=random), torch.randn(3, kv, generator=random)
        ),
    }
    found = factors_of(AdapterDelta(changes), config, "a blend")
    assert list(found) == [(1, "qkv_proj")]
    assert found[1, "qkv_proj"].rank == 5
    expected = torch.zeros(wide + 2 * kv, wide)
    for (_, name), change in changes.items():
        assert change.a is not None
        assert change.b is not None
        _, start, rows = config.place(name)
        expected[start : start + rows] = change.b.T @ change.a
    torch.testing.assert_close(found[1, "qkv_proj"].dense(), expected)


@pytest.mark.parametrize("variant", ["phi3", "starcoder2", "gemma2"])
def test_a_copy_of_a_module_is_compared_with_the_bases_own(
    bases: Bases, variant: str, tmp_path: Path
) -> None:
    base = bases.ours(variant)
    assert base.weights.file
    model, first = variants.build(variant), adapter_kinds.names(base.weights.info)[0]
    save(model, tmp_path, target_modules=[first], r=2)
    file = tmp_path / "adapter_model.safetensors"
    name = f"model.layers.1.self_attn.{first}"
    own = model.get_submodule(name).weight.detach()
    norm = ModulePaths(base.weights.info)((1, "post_attention_layernorm"))
    tensors = load_file(file)
    tensors[f"{PREFIX}{name}.base_layer.weight"] = own
    tensors[f"{PREFIX}{norm}.weight"] = model.get_submodule(norm).weight.detach()
    save_file(tensors, file, {"format": "pt"})
    spec = inspect(tmp_path, base.weights.info)
    assert {module.module for module in spec.modules} == {
        "qkv_proj" if variant == "phi3" else "q_proj"
    }
    assert sum("equals the base's own weight" in note for note in spec.notes) == 1
    tensors[f"{PREFIX}{name}.base_layer.weight"] = own.flip(0)
    save_file(tensors, file, {"format": "pt"})
    assert [reason for reason, _ in refusals(tmp_path, base)] == ["ADAPTER_UNSUPPORTED"]


@pytest.mark.parametrize("variant", ["phi3", "glm4", "starcoder2"])
def test_a_merge_into_nf4_is_quantised_by_the_modules_of_the_checkpoint(
    bases: Bases, variant: str, tmp_path: Path
) -> None:
    base = bases.ours(variant)
    adapter_kinds.adapted("DoRA", base.weights.info, bases.theirs(variant), tmp_path / "adapter")
    _, delta = open_adapter(tmp_path / "adapter", base)
    write_dense(tmp_path / "dense", base, delta, torch.float32, stamps={})
    write_nf4(tmp_path / "nf4", base, delta, torch.float32, stamps={}, force=True)
    merged = open_base(str(tmp_path / "nf4"), tmp_path / "cache")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert_equals(ours(merged, AdapterDelta()), theirs(variants.rounded(dense.eval())))


@pytest.mark.parametrize(
    "variant", ["phi3", "gemma2", "starcoder2", "smollm3", "granite", "glm4", "cohere2", "olmo2"]
)
def test_a_gguf_adapter_changes_the_tensors_of_the_familys_files(
    bases: Bases, variant: str, tmp_path: Path
) -> None:
    base, model = bases.ours(variant), adapter_kinds.built(variant)
    with_adapter = adapter_kinds.adapted("LoRA", base.weights.info, model, tmp_path / "adapter")
    _, delta = open_adapter(tmp_path / "adapter", base)
    config = base.weights.config
    factors = factors_of(delta, config, "a gguf adapter")
    write_gguf(tmp_path / "out", factors, config, name="test")
    found = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "out" / FILE).tensors}
    before = converted(model)
    after = converted(with_adapter.merge_and_unload())
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.removesuffix(".lora_a") for name in found if name.endswith("_a")} == changed
    for name in changed:
        product = found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        change = torch.from_numpy(after[name] - before[name])
        torch.testing.assert_close(product, change, atol=2e-6, rtol=0)


def test_a_gguf_adapter_of_a_family_without_gguf_files_is_refused(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases.ours("helium")
    adapter_kinds.adapted("LoRA", base.weights.info, bases.theirs("helium"), tmp_path / "adapter")
    _, delta = open_adapter(tmp_path / "adapter", base)
    config = base.weights.config
    with pytest.raises(Refusal, match="HeliumForCausalLM") as refused:
        write_gguf(tmp_path / "out", factors_of(delta, config, "x"), config, name="test")
    assert refused.value.reason == "EXPORT_UNSUPPORTED"
    assert not (tmp_path / "out").exists()


# Names


@pytest.mark.parametrize(
    ("variant", "kind", "found"),
    [
        ("phi3", "LoRA", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        ("starcoder2", "LoRA", ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")),
        (
            "gemma2",
            "norms",
            (
                "input_layernorm",
                "pre_feedforward_layernorm",
                "post_attention_layernorm",
                "post_feedforward_layernorm",
                "norm",
            ),
        ),
        ("glm4", "DoRA", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_modules_are_shown_by_their_names_in_the_file(
    bases: Bases, variant: str, kind: str, found: tuple[str, ...], tmp_path: Path
) -> None:
    base = bases.ours(variant)
    adapter_kinds.adapted(kind, base.weights.info, bases.theirs(variant), tmp_path)
    spec = inspect(tmp_path, base.weights.info)
    assert spec.target_modules == found
    assert spec.rank == (4 if kind != "norms" else 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LNTuningConfig", {"target_modules": r".*q_layernorm\.norms\.1"}),
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["q_layernorm"]}),
    ],
)
def test_a_norm_of_a_single_head_is_refused(
    bases: Bases, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base = bases.ours("stablelm-parallel")
    save(bases.theirs("stablelm-parallel"), tmp_path, kind=kind, **options)
    found = refusals(tmp_path, base)
    reason = "ADAPTER_UNSUPPORTED"
    assert any(r == reason and "the norm of a single head" in text for r, text in found), found


@pytest.mark.parametrize(
    ("variant", "module"),
    [("starcoder2", "mlp.gate_proj"), ("cohere", "post_attention_layernorm")],
)
def test_a_module_that_the_family_lacks_is_refused(
    bases: Bases, variant: str, module: str, tmp_path: Path
) -> None:
    base = bases.ours(variant)
    save(bases.theirs(variant), tmp_path, target_modules=["o_proj"], r=2)
    rename(tmp_path, lambda name: name.replace("self_attn.o_proj", module))
    reason, message = refusals(tmp_path, base)[0]
    assert reason == "BASE_MODEL_MISMATCH"
    assert "belongs to no module of this base" in message


# Text decoders of multimodal models


@pytest.fixture(scope="module")
def whole() -> Any:
    """A multimodal model in float32, whose text decoder is that of the variant "gemma3"."""
    kind, changes = variants.VARIANTS["gemma3"]
    text = variants.CONFIG_MAPPING[kind](**{**variants._SHAPE, **changes})
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4,
            image_token_index=90, boi_token_index=91, eoi_token_index=92,
        )
    )  # fmt: skip
    decoder = variants.build("gemma3")
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def whole_base(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    root = tmp_path_factory.mktemp("whole")
    whole.save_pretrained(root / "model")
    return open_base(str(root / "model"), root / "cache")


@pytest.fixture(scope="module")
def rounded(whole: Any) -> Any:
    return variants.rounded(copy.deepcopy(whole))


LANGUAGE = r".*language_model.*\.(q_proj|down_proj)"

TEXT_CASES: dict[str, dict[str, Any]] = {
    "expression": {"target_modules": LANGUAGE, "r": 3},
    "excluded": {
        "target_modules": "all-linear",
        "exclude_modules": r".*(vision_tower|multi_modal_projector).*",
        "r": 2,
    },
    "layers": {"target_modules": ["gate_proj"], "layers_to_transform": [1, 2], "r": 2},
    "saved": {
        "target_modules": LANGUAGE,
        "modules_to_save": ["language_model.norm", "pre_feedforward_layernorm"],
    },
    "rank by path": {
        "target_modules": LANGUAGE,
        "rank_pattern": {"model.language_model.layers.2.mlp.down_proj": 5},
    },
    "tokens": {"target_modules": ["up_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_an_adapter_of_a_multimodal_models_text_decoder_is_served(
    bases: Bases, rounded: Any, whole_base: LoadedBase, name: str, tmp_path: Path
) -> None:
    model = save(rounded, tmp_path, **TEXT_CASES[name])
    expected = theirs(model)
    assert (expected - theirs(rounded)).abs().max() > 3e-2
    for base in (whole_base, bases.ours("gemma3")):
        _, delta = open_adapter(tmp_path, base)
        assert_equals(ours(base, delta), expected)


def test_older_names_of_a_text_decoder_are_served(
    bases: Bases, rounded: Any, tmp_path: Path
) -> None:
    expected = theirs(save(rounded, tmp_path, target_modules=LANGUAGE, r=3))
    rename(tmp_path, lambda name: name.replace("model.language_model.", "language_model.model."))
    base = bases.ours("gemma3")
    assert "language_model.model.layers.0" in next(iter(load_names(tmp_path)))
    _, delta = open_adapter(tmp_path, base)
    assert_equals(ours(base, delta), expected)


def load_names(directory: Path) -> list[str]:
    return sorted(load_file(directory / "adapter_model.safetensors"))


def test_what_is_not_of_the_text_decoder_is_refused(
    bases: Bases, rounded: Any, whole_base: LoadedBase, tmp_path: Path
) -> None:
    save(rounded, tmp_path / "vision", target_modules=["q_proj"], r=2)
    for base in (whole_base, bases.ours("gemma3")):
        reason, message = refusals(tmp_path / "vision", base)[0]
        assert reason == "BASE_MODEL_MISMATCH"
        assert "reads images or sound" in message
        assert "vision_tower" in message
    save(rounded, tmp_path / "text", target_modules=LANGUAGE, r=2)
    reason, message = refusals(tmp_path / "text", bases.ours("llama-dynamic"))[0]
    assert reason == "BASE_MODEL_MISMATCH"
    assert "the language model within a multimodal model" in message
    rename(tmp_path / "text", lambda name: name.replace("language_model.layers.3", "layers.3"))
    reason, message = refusals(tmp_path / "text", whole_base)[0]
    assert reason == "BASE_MODEL_MISMATCH", "two spellings in one file"


def test_a_text_decoder_is_exported_as_a_text_model(
    rounded: Any, whole_base: LoadedBase, tmp_path: Path
) -> None:
    model = save(rounded, tmp_path / "adapter", target_modules=LANGUAGE, r=3)
    _, delta = open_adapter(tmp_path / "adapter", whole_base)
    write_dense(tmp_path / "out", whole_base, delta, torch.float32, stamps={})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(merged) is Gemma3ForCausalLM
    assert_equals(theirs(merged.eval()), theirs(model))
