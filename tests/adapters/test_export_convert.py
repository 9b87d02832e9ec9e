"""PiSSA and similar adapters as plain LoRA, compared with PEFT's own conversion and its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters.export_bases import PROMPT, Bases, agree
from loraplex_adapters.convert.export.base import LIMITS
from loraplex_adapters.convert.export.mutated import convert
from loraplex_adapters.format.examine import inspect
from loraplex_model.base.refusal import Refusal
from safetensors.torch import load_file, save_file

from model import tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 8},
    "olora": {"init_lora_weights": "olora", "r": 4, "lora_alpha": 4},
    "pissa by iterations": {"init_lora_weights": "pissa_niter_4", "r": 5, "lora_alpha": 2},
    "patterns": {
        "init_lora_weights": "pissa",
        "r": 4,
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 3},
    },
    "rsLoRA": {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 5, "use_rslora": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def trained(directory: Path, options: dict[str, Any]) -> Any:
    """PEFT's model after some training, with `initial`, `raw` and `plain` saved by PEFT."""
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(**options))
    config = model.peft_config["default"]
    name, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(directory / "initial")
    config.init_lora_weights = name
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    model.save_pretrained(directory / "raw")
    model.save_pretrained(
        directory / "plain", path_initial_model_for_weight_conversion=str(directory / "initial")
    )
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_converted_adapter_is_the_trained_model(
    options: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    model = trained(tmp_path, options)
    convert(tmp_path / "raw", tmp_path / "initial", tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path / "ours").eval()
    agree(logits(loaded), logits(model))
    by_peft = load_file(tmp_path / "plain/adapter_model.safetensors")
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert ours.keys() == by_peft.keys()
    for name, tensor in by_peft.items():
        assert torch.equal(ours[name], tensor), name
    spec = inspect(tmp_path / "ours", bases("llama").weights.info, LIMITS)
    if not {"rank_pattern", "use_rslora"} & options.keys():
        oracle = inspect(tmp_path / "plain", bases("llama").weights.info, LIMITS)
        assert [m.scale for m in spec.modules] == [m.scale for m in oracle.modules]
        assert [m.rank for m in spec.modules] == [m.rank for m in oracle.modules]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_lora_weights": True}, "CONVERT_UNSUPPORTED"),
        ({"init_lora_weights": "loftq"}, "CONVERT_UNSUPPORTED"),
        ({"use_dora": True}, "CONVERT_UNSUPPORTED"),
        ({"peft_type": "IA3"}, "CONVERT_UNSUPPORTED"),
        ({"lora_alpha": 77}, "ADAPTER_INVALID"),
        ({"r": 5}, "ADAPTER_INVALID"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    trained(tmp_path, OPTIONS["pissa"])
    path = tmp_path / "raw/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Refusal) as refused:
        convert(tmp_path / "raw", tmp_path / "initial", tmp_path / "ours")
    assert refused.value.reason == reason
    assert not (tmp_path / "ours").exists()


@pytest.mark.filterwarnings("ignore")
def test_an_initial_adapter_of_other_modules_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, OPTIONS["pissa"])
    file = tmp_path / "initial/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(sorted(tensors))))
    save_file(tensors, file)
    with pytest.raises(Refusal) as refused:
        convert(tmp_path / "raw", tmp_path / "initial", tmp_path / "ours")
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", "initial")
