"""Merged checkpoints: transformers loads them, and its logits equal the server's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.adapter_files import write_adapter
from adapters.export_bases import PROMPT, Bases, agree, rows
from adapters.peft_files import write
from loraplex_adapters.convert.export.account import measure, total
from loraplex_adapters.convert.export.base import open_adapter, open_base
from loraplex_adapters.convert.export.merged import LEAST_RETAINED, write_dense, write_nf4
from loraplex_model.adapters.delta import Activation, AdapterDelta, BottleneckDelta, ProjectionDelta
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.ops import nf4
from model.changes import random_adapter, random_prompt
from model.gguf_files import write as write_gguf_base
from model.peft_oracle import _compute_as_asked
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapters import folded_cases, peft_files

MERGEABLE = (
    "lora",
    "dora on a biased base",
    "bias all",
    "lora_bias",
    "embeddings and head",
    "tied embeddings",
    "tied tokens",
    "tied tokens that differ",
    "saved norms",
    "saved head",
    "saved tied, both",
    "adalora, pruned",
    "ia3",
    "ia3 on squares",
    "norms of heads",
    "tokens",
    "lokr of whole matrices",
    "gralora, hybrid",
    "vera from its seed",
)
CASES = {**peft_files.CASES, **folded_cases.CASES}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def load(directory: Path, **options: Any) -> Any:
    """Loads transformers' model; asserts that no tensor is missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return found


def small_lora(base: LoadedBase, share: float) -> AdapterDelta:
    """A rank-4 change of every projection, of `share` times the norm of each weight."""
    random = torch.Generator().manual_seed(1)
    sites = {}
    for layer in range(base.weights.config.num_layers):
        for name, (fan_in, out) in base.weights.config.projection_shapes().items():
            a = torch.randn(4, fan_in, generator=random)
            b = torch.randn(4, out, generator=random)
            size = share * out**0.5 / torch.linalg.matrix_norm(b.T @ a).item()
            sites[layer, name] = ProjectionDelta(a=a, b=b * size)  # tiny's weights: rows of norm 1
    return AdapterDelta(sites)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_checkpoint_computes_what_the_server_does(
    name: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases(CASES[name].variant)
    _, delta = open_adapter(write(CASES[name], tmp_path / "adapter"), base)
    write_dense(tmp_path / "out", base, delta, torch.float32, stamps={})
    found = logits(load(tmp_path / "out"))
    agree(found, rows(base, (delta, 1.0)))
    agree(found, rows(base, (delta, 1.0), merged=True))
    assert (found - rows(base)).abs().max() > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize("name", ["tied embeddings", "saved tied, both"])
@pytest.mark.filterwarnings("ignore")
def test_a_tied_base_is_untied_only_where_the_two_differ(
    name: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases(CASES[name].variant)
    _, delta = open_adapter(write(CASES[name], tmp_path / "adapter"), base)
    write_dense(tmp_path / "out", base, delta, torch.float32, stamps={})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is (name == "saved tied, both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_are_rounded_once_to_the_asked_type(
    dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    base, config = bases("llama"), bases("llama").weights.config
    delta = random_adapter("lora", config, seed=4)
    write_dense(tmp_path / "exact", base, delta, torch.float32, stamps={})
    write_dense(tmp_path / "half", base, delta, dtype, stamps={}, shard_bytes=1 << 17)
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    exact, half = load(tmp_path / "exact"), load(tmp_path / "half", dtype="auto")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] in str(dtype)
    for name, parameter in exact.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.to(dtype)), name


def test_what_rounding_adds_is_measured(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    delta = small_lora(base, 0.003)
    noise = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept = write_dense(tmp_path / str(dtype), base, delta, dtype, stamps={})
        noise[dtype] = total(kept).noise
    # reference: 0.56 and 0.07 for random inputs at this size
    assert 0.3 < noise[torch.bfloat16] < 0.8
    assert 0.03 < noise[torch.float16] < 0.1
    assert noise[torch.float32] == 0


def test_the_stamps_are_in_every_file_and_the_bytes_are_the_same_every_time(
    bases: Bases, tmp_path: Path
) -> None:
    from safetensors import safe_open

    base = bases("llama")
    delta = random_adapter("lora", base.weights.config, seed=4)
    for out in ("one", "two"):
        write_dense(tmp_path / out, base, delta, torch.float32, stamps={"loraplex_x": "y"})
    one, two = (tmp_path / out / "model.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "loraplex_x": "y"}


def test_what_no_weight_can_hold_is_refused(bases: Bases, tmp_path: Path) -> None:
    base = bases("mistral")
    config = base.weights.config
    bottleneck = BottleneckDelta(torch.ones(2, 64), torch.ones(2, 64), activation=Activation.RELU)
    for delta, word in (
        (random_prompt(config, 3, seed=0), "virtual tokens"),
        (AdapterDelta({(1, "mlp_bottleneck"): bottleneck}), "mlp bottleneck"),
        (AdapterDelta({(0, "o_proj"): ProjectionDelta(bias=torch.ones(64))}), "o_proj"),
    ):
        with pytest.raises(Refusal, match=word) as refused:
            write_dense(tmp_path / "out", base, delta, torch.float32, stamps={})
        assert refused.value.reason == "EXPORT_UNSUPPORTED"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.003, -0.1, 0.1), (0.1, 0.6, 0.95), (0.3, 0.97, 1.01)]
)
def test_nf4_rounds_small_changes_away_and_keeps_large_ones(
    share: float, least: float, most: float
) -> None:
    random = torch.Generator().manual_seed(0)
    base = nf4.dequantize(nf4.quantise(torch.randn(512, 512, generator=random)))
    change = torch.randn(512, 16, generator=random) @ torch.randn(16, 512, generator=random)
    change *= share * torch.linalg.matrix_norm(base) / torch.linalg.matrix_norm(change)
    merged = base + change
    kept = measure("w", base.clone(), merged, nf4.dequantize(nf4.quantise(merged)))
    assert least < kept.retained < most


def test_an_nf4_merge_that_loses_the_change_is_refused(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    delta = small_lora(base, 0.003)
    with pytest.raises(Refusal, match="--force") as refused:
        write_nf4(tmp_path / "out", base, delta, torch.float32, stamps={})
    assert refused.value.reason == "EXPORT_DELTA_LOST"
    kept = write_nf4(tmp_path / "forced", base, delta, torch.float32, stamps={}, force=True)
    assert total(kept).retained < 0.2
    assert len(kept) == 3 * 7


def test_a_large_change_of_the_head_does_not_hide_a_lost_one(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    head = random_adapter("whole-head", base.weights.config, seed=0)
    delta = AdapterDelta({**small_lora(base, 0.003).sites, **head.sites})
    with pytest.raises(Refusal) as refused:
        write_nf4(tmp_path / "out", base, delta, torch.float32, stamps={})
    assert refused.value.reason == "EXPORT_DELTA_LOST"


def test_matrices_that_were_quantised_once_stay_so(bases: Bases, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        bases.directory("llama"), quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "base")
    base = open_base(str(tmp_path / "base"), tmp_path / "cache")
    large = small_lora(base, 0.5)
    delta = AdapterDelta({site: d for site, d in large.sites.items() if site[1] != "down_proj"})
    write_nf4(tmp_path / "out", base, delta, torch.float32, stamps={})
    again = open_base(str(tmp_path / "out"), tmp_path / "cache")
    for layer, own in zip(again.weights.layers, base.weights.layers, strict=True):
        assert torch.equal(layer.down.packed, own.down.packed)
        assert torch.equal(layer.down.absmax, own.down.absmax)
        assert layer.down.absmax.dtype == torch.float32


@pytest.mark.parametrize("variant", ["llama", "llama-tied-bias", "qwen3"])
def test_a_gguf_base_becomes_a_checkpoint_too(variant: str, tmp_path: Path) -> None:
    base = open_base(str(write_gguf_base(variant, tmp_path / "base.gguf")), tmp_path / "cache")
    delta = random_adapter("lora", base.weights.config, seed=2)
    write_dense(tmp_path / "out", base, delta, torch.float32, stamps={})
    agree(logits(load(tmp_path / "out")), rows(base, (delta, 1.0)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["qwen2", "llama-odd-sizes"])
def test_an_nf4_merge_is_read_back_by_us_and_by_transformers(
    variant: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases(variant)
    large = small_lora(base, 0.5)
    delta = AdapterDelta({site: d for site, d in large.sites.items() if site[1] != "down_proj"})
    kept = write_nf4(tmp_path / "out", base, delta, torch.float32, stamps={})
    assert total(kept).retained >= LEAST_RETAINED
    again = open_base(str(tmp_path / "out"), tmp_path / "cache")
    for layer, own in zip(again.weights.layers, base.weights.layers, strict=True):
        assert torch.equal(layer.down.packed, own.down.packed), "an unchanged module changed"
        assert not torch.equal(layer.o.packed, own.o.packed)
    write_dense(tmp_path / "dense", base, delta, torch.float32, stamps={})
    for i, layer in enumerate(open_base(str(tmp_path / "dense"), tmp_path / "c2").weights.layers):
        assert torch.equal(layer.qkv.packed, again.weights.layers[i].qkv.packed)
    if base.weights.config.hidden_size % 64:
        return  # bitsandbytes takes blocks to lie within rows on some machines
    model = load(tmp_path / "out", device_map="cpu")
    _compute_as_asked(model)
    agree(logits(model), rows(again))


def test_a_gguf_base_whose_positions_no_configuration_can_say_is_refused(tmp_path: Path) -> None:
    file = write_gguf_base("llama-rope-llama3", tmp_path / "base.gguf")
    base = open_base(str(file), tmp_path / "cache")
    with pytest.raises(Refusal, match="scales positions") as refused:
        write_dense(tmp_path / "out", base, AdapterDelta(), torch.float32, stamps={})
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


def test_the_tokenizer_comes_along(bases: Bases, tmp_path: Path) -> None:
    directory = bases.directory("qwen3")
    files = {"tokenizer_config.json": "{}", "merges.txt": "x", "chat_template.jinja": "y"}
    base = bases("qwen3")
    for name, text in files.items():
        (directory / name).write_text(text)
    try:
        delta = random_adapter("norms", base.weights.config, seed=1)
        write_dense(tmp_path / "out", base, delta, torch.float32, stamps={})
    finally:
        for name in files:
            (directory / name).unlink()
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert (tmp_path / "out/generation_config.json").exists()


def test_an_adapter_that_does_not_fit_is_refused_as_by_the_server(
    bases: Bases, tmp_path: Path
) -> None:
    with pytest.raises(Refusal) as refused:
        open_adapter(write_adapter(tmp_path), bases("llama"))
    assert refused.value.reason == "BASE_MODEL_MISMATCH"
