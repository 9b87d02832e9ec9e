"""What PEFT writes is what is served: the same factors with the same scale, module by module."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.adapter_files import BASE
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.format import examine, inspect
from loraplex_adapters.tensors import load, load_blob
from loraplex_model.adapter import pack
from loraplex_model.config import DecoderConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

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
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "EVA": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "no task type": {"r": 4, "target_modules": ["q_proj"], "task_type": None},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
    "bias": ({"bias": "all"}, "bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [0, 3]}, "trainable_token_indices"),
    "aLoRA": ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
    "task type": ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "expression as pattern": ({"alpha_pattern": {r".*q_proj": 3}}, "alpha_pattern"),
}


def tiny_model() -> Any:
    """A fresh Llama with the shapes of `BASE`."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def save(directory: Path, options: dict[str, Any]) -> Any:
    """Lets PEFT write an adapter with random factors; returns the model that holds it."""
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(directory)
    return model


def peft_factors(model: Any) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, float]]:
    """A, B and scale of every module that PEFT applies, as it holds them."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            layer = int(re.search(r"layers\.(\d+)\.", name)[1])  # type: ignore[index]
            found[layer, name.rsplit(".", 1)[1]] = (
                module.lora_A["default"].weight.detach(),
                module.lora_B["default"].weight.detach(),
                module.scaling["default"],
            )
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_factors_and_scales_are_those_that_peft_loads(
    options: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, options)
    reloaded = peft_factors(peft.PeftModel.from_pretrained(tiny_model(), tmp_path))
    spec = inspect(tmp_path, BASE)
    factors = load(tmp_path, spec)
    assert factors.keys() == reloaded.keys()
    for place, (a, b, scale) in reloaded.items():
        assert torch.equal(factors[place].a, a)
        assert torch.equal(factors[place].b, b)
        assert factors[place].scale == scale
    assert spec.rank == max(a.shape[0] for a, _, _ in reloaded.values())
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
    trained = peft_factors(save(tmp_path, options))
    reloaded = peft_factors(peft.PeftModel.from_pretrained(tiny_model(), tmp_path))
    assert trained[0, "v_proj"][2] != reloaded[0, "v_proj"][2], "PEFT has fixed it: serve them"
    with pytest.raises(AdapterError, match="order") as refused:
        inspect(tmp_path, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_UNSUPPORTED", "alpha_pattern")


@pytest.mark.filterwarnings("ignore")
def test_a_refused_initialisation_names_the_way_out_and_the_way_out_works(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        tiny_model(),
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
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        inspect(tmp_path / "raw", BASE)
    assert inspect(tmp_path / "plain", BASE).rank == 16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_dtype_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, {"r": 4})
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    spec = inspect(tmp_path, BASE)
    expected = load_file(file)
    factors = load(tmp_path, spec)
    for module in spec.modules:
        lora = factors[module.layer, module.module]
        assert lora.a.dtype == dtype
        assert torch.equal(lora.a, expected[module.a.name])
        assert torch.equal(lora.b, expected[module.b.name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_bytes_are_those_of_the_packed_adapter(dtype: str, tmp_path: Path) -> None:
    save(tmp_path, {"r": 3, "target_modules": "all-linear", "rank_pattern": {"q_proj": 5}})
    spec, factors = load_blob(tmp_path, inspect(tmp_path, BASE).digest, BASE)
    config = DecoderConfig(
        "llama", 40, 32, 48, 2, 4, 2, 8, 1e-6, (1.0,), 1.0, 64, *(False,) * 4, (None, None)
    )
    assert dict(config.projection_shapes()) == dict(BASE.projections)
    packed = pack(factors, config, getattr(torch, dtype))
    assert packed.nbytes == spec.packed_bytes(dtype)
    assert np.count_nonzero(packed.ranks) == len(spec.modules)


@pytest.mark.filterwarnings("ignore")
def test_every_key_that_peft_writes_is_known(tmp_path: Path) -> None:
    from loraplex_adapters.support import INFORMATIONAL, MEANINGFUL, UNSUPPORTED

    save(tmp_path, {})
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.keys() <= INFORMATIONAL | MEANINGFUL | UNSUPPORTED.keys()
    assert not (INFORMATIONAL | MEANINGFUL) & UNSUPPORTED.keys()
