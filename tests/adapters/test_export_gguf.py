"""GGUF adapters: the gguf package reads them, and llama.cpp's formula yields our changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters.export_bases import Bases
from adapters.peft_files import CASES, lora, write
from gguf import GGUFReader
from loraplex_adapters.convert.export.base import open_adapter
from loraplex_adapters.convert.export.factors import factors_of
from loraplex_adapters.convert.export.gguf_adapter import FILE, tensor_name, write_gguf
from loraplex_adapters.format.modules import EMBEDDING
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.gguf.names import GgufNames
from loraplex_model.checkpoints.gguf.source import halves
from model.changes import random_adapter

NAMES = {
    "llama": lora("llama", {}, r=4, target_modules="all-linear", rank_pattern={"k_proj": 6}),
    "odd heads": lora("llama-odd-sizes", {}, target_modules=["q_proj", "k_proj"]),
    "qwen2": lora("qwen2", {}, target_modules=["q_proj", "k_proj"], use_rslora=True),
    "qwen3": lora("qwen3", {}, target_modules=["q_proj", "o_proj"]),
    "mistral": lora("mistral", {}, target_modules=["k_proj", "down_proj"]),
    "vocabulary": CASES["embeddings and head"],
    "adalora": CASES["adalora, pruned"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns metadata, and the tensors as float32 in numpy's order of dimensions."""
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        values = torch.from_numpy(data)
        if tensor.tensor_type.name == "BF16":
            values = values.view(torch.bfloat16)
        tensors[tensor.name] = values.float()
    return metadata, tensors


def applied(metadata: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """alpha / rank * B A, as in llama.cpp's `get_scale` and its graph."""
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    scale = metadata["adapter.lora.alpha"] / b.shape[1]  # b->ne[0]
    return scale * (b @ (a.T if name.startswith("token_embd") else a))


def as_served(dense: torch.Tensor, module: str, config: DecoderConfig) -> torch.Tensor:
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    if module in heads and config.architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        return halves(dense, heads[module])
    return dense


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "odd heads", "qwen2", "qwen3", "mistral", "vocabulary"])
def test_products_are_ours_in_llama_cpps_order(
    name: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    base = bases(NAMES[name].variant)
    config = base.weights.config
    _, delta = open_adapter(write(NAMES[name], tmp_path / "adapter"), base)
    factors = factors_of(delta, config, "a gguf adapter")
    write_gguf(tmp_path / "out", factors, config, name="test", dtype=dtype)
    metadata, tensors = read(tmp_path / "out" / FILE)
    architecture = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == architecture.get(config.architecture, "llama")
    assert len(tensors) == 2 * len(factors)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    names = GgufNames(metadata["general.architecture"], config.num_layers)
    for site, found in factors.items():
        product = as_served(
            applied(metadata, tensors, tensor_name(site, config.architecture, names)),
            site[1],
            config,
        )
        scale = found.dense().abs().max()
        torch.testing.assert_close(product / scale, found.dense() / scale, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_shapes_are_those_that_llama_cpp_checks(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    _, delta = open_adapter(write(NAMES["vocabulary"], tmp_path / "adapter"), base)
    config = base.weights.config
    factors = factors_of(delta, config, "a gguf adapter")
    write_gguf(tmp_path / "out", factors, config, name="test")
    _, tensors = read(tmp_path / "out" / FILE)
    hidden, vocab = config.hidden_size, config.vocab_size
    rank = factors[EMBEDDING].rank
    assert tensors["token_embd.weight.lora_a"].shape == (vocab, rank)
    assert tensors["token_embd.weight.lora_b"].shape == (hidden, rank)
    assert tensors["output.weight.lora_a"].shape == (rank, hidden)
    assert tensors["output.weight.lora_b"].shape == (vocab, rank)


@pytest.mark.filterwarnings("ignore")
def test_pruned_adalora_is_folded(bases: Bases, tmp_path: Path) -> None:
    base = bases(NAMES["adalora"].variant)
    case = NAMES["adalora"]
    plain = {key: value for key, value in case.options.items() if key != "bias"}
    spec_case = type(case)(case.variant, case.kind, plain, case.sites, case.prepare)
    _, delta = open_adapter(write(spec_case, tmp_path / "adapter"), base)
    write_gguf(
        tmp_path / "out",
        factors_of(delta, base.weights.config, "x"),
        base.weights.config,
        name="test",
    )
    _, tensors = read(tmp_path / "out" / FILE)
    assert {name for name in tensors if "attn_v" in name} == set()
    assert tensors["blk.0.attn_q.weight.lora_a"].shape[0] == 2
    assert tensors["blk.1.attn_q.weight.lora_a"].shape[0] == 3


def test_what_llama_cpp_cannot_apply_is_refused(bases: Bases, tmp_path: Path) -> None:
    tied = bases("llama-tied-bias").weights.config
    for kind in ("embedding", "head"):
        delta = random_adapter(kind, tied, seed=0)
        factors = factors_of(delta, tied, "a gguf adapter")
        with pytest.raises(Refusal, match="ties") as refused:
            write_gguf(tmp_path / "out", factors, tied, name="test")
        assert refused.value.reason == "EXPORT_UNSUPPORTED"
    with pytest.raises(Refusal, match="changes nothing"):
        factors_of(AdapterDelta(), tied, "a gguf adapter")


def test_the_permutation_is_the_inverse_of_the_one_that_reads_models() -> None:
    from loraplex_adapters.convert.export.gguf_adapter import _interleaved

    rows = torch.arange(3 * 8 * 2.0).view(24, 2)
    assert torch.equal(halves(_interleaved(rows, 3), 3), rows)
