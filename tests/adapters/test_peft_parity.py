"""LoRA's options mean what they mean in PEFT: factors and scales, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.peft_files import base_info
from adapters.peft_kinds import Gallery
from loraplex_adapters.format.examine import examine, inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.base.refusal import Refusal
from model.peft_oracle import factors_of
from safetensors.torch import load_file, save_file

from model import tiny

VARIANT = "llama"
BASE = base_info(VARIANT)

SERVED: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "target_modules": ["q_proj"]},
    "rank 16": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "alpha is no integer": {"r": 3, "lora_alpha": 0.7, "target_modules": ["o_proj"]},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "MLP only": {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "regular expression": {"r": 4, "target_modules": r".*layers\.1\..*(k|o)_proj"},
    "rsLoRA": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"]},
    "rank_pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 7, "model.layers.1.self_attn.q_proj": 2},
    },
    "alpha_pattern": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "q_proj": 40},
    },
    "patterns with rsLoRA": {
        "r": 4,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.down_proj": 6},
        "alpha_pattern": {"down_proj": 21, "self.attn.q_proj": 2},
    },
    "keys that match nothing": {
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {
            "fc1": 9,
            "proj": 5,
            "base_model.model.model.layers.0.self_attn.q_proj": 3,
        },
    },
    "overlapping keys that agree": {
        "r": 4,
        "target_modules": ["v_proj"],
        "alpha_pattern": {"v_proj": 16, "layers.0.self_attn.v_proj": 16},
    },
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1},
    "listed layers": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "a full path beside listed layers": {
        "r": 4,
        "target_modules": ["model.layers.1.mlp.up_proj", "q_proj"],
        "layers_to_transform": [0],
    },
    "excluded modules": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["k_proj", "layers.0.self_attn.q_proj"],
    },
    "an excluded string": {
        "r": 4,
        "target_modules": ["q_proj"],
        "exclude_modules": "model.layers.0.self_attn.q_proj",
    },
    "an excluded string that matches nothing": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": "q_proj",
    },
    "expressions as keys": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r".*\.layers\.1\..*(q_proj|v_proj)$": 6, r"^model.*down_proj": 3},
        "alpha_pattern": {r"layers\.[01]\.(?:self_attn|mlp)\.(q|down)_proj": 5},
    },
    "an expression for the targets": {
        "r": 4,
        "target_modules": r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj",
        "exclude_modules": r".*(vision_tower|\.0\.mlp).*",
    },
    "look-ahead in the targets": {"r": 4, "target_modules": r"^(?!.*(?:visual|mlp)).*(?:q|v)_proj"},
    "globs that exclude nothing": {
        "r": 4,
        "target_modules": ["q_proj"],
        "exclude_modules": ["*vision_tower*", "*q_proj"],
    },
    "an expression for the list of layers": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": r"l[a-z]+s",
    },
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "EVA": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "aLoRA": {"r": 4, "alora_invocation_tokens": [3, 4, 3]},
    "aLoRA with biases of B": {
        "r": 4,
        "alora_invocation_tokens": [0],
        "target_modules": ["q_proj"],
        "lora_bias": True,
    },
    "no task type": {"r": 4, "target_modules": ["q_proj"], "task_type": None},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "aLoRA with biases": ({"alora_invocation_tokens": [3, 4], "bias": "all"}, "bias"),
    "aLoRA with a saved head": (
        {"alora_invocation_tokens": [3, 4], "modules_to_save": ["lm_head"]},
        "modules_to_save",
    ),
    "aLoRA with trained tokens": (
        {"alora_invocation_tokens": [3, 4], "trainable_token_indices": [5]},
        "trainable_token_indices",
    ),
    "task type": ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
    "a reference in an expression": ({"alpha_pattern": {r"(q)_proj\1?": 3}}, "alpha_pattern"),
}


def save(directory: Path, options: dict[str, Any]) -> Any:
    """Writes an adapter with random factors with PEFT; returns the model that has it."""
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(tiny.build(VARIANT), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.create_or_update_model_card = lambda _: None  # takes longer than all the rest
    model.save_pretrained(directory)
    return model


def reload(directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(tiny.build(VARIANT), directory)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_factors_and_scales_are_those_that_peft_loads(
    gallery: Gallery, options: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, options)
    reloaded = factors_of(reload(tmp_path), "default")
    digest = inspect(tmp_path, BASE).digest
    spec, delta = load(tmp_path, digest, gallery.weights(VARIANT))
    assert {(m.layer, m.module): m.scale for m in spec.modules} == {
        site: lora.scale for site, lora in reloaded.items()
    }
    assert delta.sites.keys() == reloaded.keys()
    for site, lora in reloaded.items():
        assert torch.equal(delta.sites[site].a, lora.a)
        assert torch.equal(delta.sites[site].b, lora.b.T * lora.scale)
    assert spec.rank == max(lora.a.shape[0] for lora in reloaded.values())
    assert set(spec.target_modules) == {module for _, module in reloaded}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("options", "field"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_name(
    options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    save(tmp_path, options)
    report = examine(tmp_path, BASE)
    assert report.spec is None
    unsupported = [f for f in report.findings if f.reason == "ADAPTER_UNSUPPORTED"]
    assert any(field in f.field and field in f.message for f in unsupported)


@pytest.mark.filterwarnings("ignore")
def test_overlapping_patterns_that_peft_itself_misreads_are_refused(tmp_path: Path) -> None:
    options = {
        "target_modules": ["v_proj"],
        "alpha_pattern": {"v_proj": 16, "layers.0.self_attn.v_proj": 64},
    }
    trained = factors_of(save(tmp_path, options), "default")
    reloaded = factors_of(reload(tmp_path), "default")
    assert trained[0, "v_proj"].scale != reloaded[0, "v_proj"].scale, "PEFT mended it: serve them"
    with pytest.raises(Refusal, match="order") as refused:
        inspect(tmp_path, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_UNSUPPORTED", "alpha_pattern")


@pytest.mark.filterwarnings("ignore")
def test_a_refused_initialisation_names_the_way_out_and_the_way_out_works(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tiny.build(VARIANT),
        peft.LoraConfig(
            target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
        ),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    with pytest.raises(Refusal, match="convert --from pissa --initial DIR"):
        inspect(tmp_path / "raw", BASE)
    assert inspect(tmp_path / "plain", BASE).rank == 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_bits(
    gallery: Gallery, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(tmp_path, {"r": 4, "lora_alpha": 3})
    file = tmp_path / "adapter_model.safetensors"
    expected = {k: v.to(dtype) for k, v in load_file(file).items()}
    save_file(expected, file)
    digest = inspect(tmp_path, BASE).digest
    spec, delta = load(tmp_path, digest, gallery.weights(VARIANT))
    for module in spec.modules:
        change = delta.sites[module.layer, module.module]
        assert torch.equal(change.a, expected[module.tensors["a"].name])
        assert torch.equal(change.b, expected[module.tensors["b"].name].float().T * 0.75)
