"""Adapters of mixtures of experts: LoRA on attention and, as parameters, on the experts."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import variants
from loraplex_adapters.convert.export.exporter import ExportRequest, run
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.spec import AdapterLimits
from loraplex_adapters.load.tensors import load
from loraplex_model.adapters.merge import merged_nbytes
from loraplex_model.adapters.pack import PackedAdapter, pack
from loraplex_model.base.batch import ForwardBatch
from loraplex_model.base.refusal import Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints.load import load_base
from loraplex_model.decoder.native import NativeDecoder
from loraplex_model.decoder.reference import ReferenceDecoder
from safetensors.torch import load_file, save_file

BASES = ("mixtral", "qwen3-moe")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
CHANCE = torch.Generator().manual_seed(1)
TOKENS = tuple(torch.randint(3, variants.VOCAB, (20,), generator=CHANCE).tolist())
CASES: dict[str, dict[str, Any]] = {
    "attention and experts": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [GATE_UP, DOWN],
    },
    "experts alone": {"target_modules": [], "target_parameters": [DOWN, GATE_UP]},
    "gate and up alone": {"target_modules": ["v_proj"], "target_parameters": [GATE_UP]},
    "down alone": {"target_modules": [], "target_parameters": [DOWN], "use_rslora": True},
    "one layer's experts": {
        "target_modules": ["k_proj"],
        "target_parameters": [f"layers.1.{GATE_UP}", f"layers.2.{DOWN}"],
    },
}


@cache
def base(variant: str, root: str) -> BaseWeights:
    path = variants.write(variant, Path(root) / variant)
    return load_base(str(path), torch.float32, Path(root) / "cache").weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("experts"))


def written(variant: str, directory: Path, **options: Any) -> torch.Tensor:
    """Saves PEFT's adapter with random weights; returns the logits of PEFT's model in float64."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(variants.rounded(variants.build(variant)), config).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=random)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        logits: torch.Tensor = model.double()(torch.tensor([TOKENS])).logits[0]
    return logits.float()


def packed(directory: Path, weights: BaseWeights) -> PackedAdapter:
    """The adapter as the server reads it; its size is known before it is packed."""
    spec = inspect(directory, weights.info, AdapterLimits())
    found = pack(load(directory, spec.digest, weights)[1], weights.embed.dtype)
    assert spec.packed_bytes == found.data.nbytes
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", BASES)
def test_logits_equal_pefts(variant: str, case: str, root: str, tmp_path: Path) -> None:
    weights = base(variant, root)
    expected = written(variant, tmp_path, **CASES[case])
    adapter = packed(tmp_path, weights)
    everything = list(range(2 * len(TOKENS)))
    for decoder in (
        ReferenceDecoder(weights, 8, 16, 1, keep_dense=True),
        NativeDecoder(weights, 8, 16, 1, threads=2),
    ):
        rows = [(list(TOKENS), 0, [0, 1], ((0, 1.0),)), (list(TOKENS), 0, [2, 3], ())]
        plain = decoder.forward(ForwardBatch.build(rows[1:], everything[: len(TOKENS)]))
        decoder.table.publish(0, adapter)
        logits = decoder.forward(ForwardBatch.build(rows, everything))
        assert (logits[: len(TOKENS)] - expected).abs().max() < 2e-5
        assert (logits[: len(TOKENS)] - plain).abs().max() > 0.1
        assert torch.equal(logits[len(TOKENS) :], plain)


def test_a_row_of_an_expert_adapter_has_the_same_bits_alone(root: str, tmp_path: Path) -> None:
    weights = base("qwen3-moe", root)
    written("qwen3-moe", tmp_path, **CASES["attention and experts"])
    decoder = NativeDecoder(weights, 8, 16, 1, threads=2)
    decoder.table.publish(0, packed(tmp_path, weights))
    mix = ((0, 0.7),)
    together = decoder.forward(
        ForwardBatch.build([(list(TOKENS), 0, [0, 1], mix), (list(TOKENS[3:]), 0, [2, 3], ())])
    )[0]
    for first, token in enumerate(TOKENS):
        alone = decoder.forward(ForwardBatch.build([([token], first, [4, 5], mix)]))[0]
    assert torch.equal(alone, together)


def test_adapters_of_experts_are_not_merged(root: str, tmp_path: Path) -> None:
    weights = base("mixtral", root)
    written("mixtral", tmp_path, **CASES["attention and experts"])
    changes = packed(tmp_path, weights).unpack()
    assert merged_nbytes(changes, weights.config, torch.float32) == 0


@pytest.mark.parametrize("form", ["hf", "nf4", "peft", "gguf"])
def test_adapters_of_experts_are_not_exported(form: str, root: str, tmp_path: Path) -> None:
    base("mixtral", root)
    written("mixtral", tmp_path / "adapter", **CASES["attention and experts"])
    request = ExportRequest(("adapter",), form, str(Path(root) / "mixtral"), Path(root) / "cache")
    with pytest.raises(Refusal) as caught:
        run(request, tmp_path / "out", lambda name: tmp_path / name)
    assert caught.value.reason == "EXPORT_UNSUPPORTED"
    assert "experts" in caught.value.message
    assert not (tmp_path / "out").exists()


def edited(directory: Path, change: Any) -> None:
    """Changes the tensors and the configuration of a saved adapter in place."""
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors, options = load_file(file), json.loads(config.read_text())
    change(tensors, options)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    config.write_text(json.dumps(options))


def _named_only(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    for name in [name for name in tensors if "layers.2.mlp" in name]:
        del tensors[name]


def _not_named(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    options["target_parameters"] = [GATE_UP]


def _other_count(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "layers.0.mlp" in name:
            tensors[name] = tensor[:-1] if "lora_A" in name else tensor[:, :-1]


def _other_rank(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    options["r"], options["rank_pattern"] = 2, {"q_proj": 4, "o_proj": 4}


def _other_parameter(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    options["target_parameters"] = ["mlp.gate.weight"]


REFUSED = {
    "has no weights": _named_only,
    "is not named": _not_named,
    "cannot share": _other_count,
    "has rank 4 in the weights and 2": _other_rank,
    "mlp.gate.weight (the router, which all-linear includes)": _other_parameter,
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_fit_is_refused(says: str, root: str, tmp_path: Path) -> None:
    written("mixtral", tmp_path, **CASES["attention and experts"])
    edited(tmp_path, REFUSED[says])
    with pytest.raises(Refusal) as caught:
        inspect(tmp_path, base("mixtral", root).info, AdapterLimits())
    assert says in " ".join(problem.message for problem in caught.value.problems)


def test_experts_of_another_base_are_refused(root: str, tmp_path: Path) -> None:
    written("mixtral", tmp_path, **CASES["experts alone"])
    path = variants.write("llama-mlp-bias", tmp_path / "base")
    plain = load_base(str(path), torch.float32, tmp_path / "cache").weights
    for info in (plain.info, base("qwen3-moe", root).info):
        with pytest.raises(Refusal) as caught:
            inspect(tmp_path, info, AdapterLimits())
        assert caught.value.reason == "BASE_MODEL_MISMATCH"
