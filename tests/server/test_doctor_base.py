"""`loraplex-server doctor` says whether a base and adapters will be served, and changes nothing.

Its answers are compared with what loading, converting and registering do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import variants
from loraplex_adapters.format import examine
from loraplex_model.base.config import DecoderConfig
from loraplex_model.base.refusal import Refusal
from loraplex_model.checkpoints import load
from loraplex_model.checkpoints.checkpoint import SafetensorsSource
from loraplex_model.checkpoints.conversion.survey import survey
from loraplex_model.checkpoints.outlook.base import look
from loraplex_model.checkpoints.outlook.footprint import Footprint
from loraplex_model.checkpoints.outlook.speed import DeviceSpeed
from loraplex_model.decoder.cuda import support
from loraplex_model.decoder.native import NativeDecoder
from loraplex_server.commands import doctor_base
from loraplex_server.commands.checks import Check, adapter_limits
from loraplex_server.commands.program import app
from loraplex_server.config import Config
from loraplex_server.config_sources import load as load_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model import gguf_files, tiny

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that no other process of this machine changes."""
    monkeypatch.setattr(
        "loraplex_model.checkpoints.outlook.speed.measure",
        lambda device, dtype, threads: DeviceSpeed(read=1e9, multiplied=1e9),
    )


def settings(tmp_path: Path, model: object, **more: str) -> Config:
    flags = {"model": str(model), "cache": str(tmp_path / "cache"), "dtype": "float32"}
    return load_config(None, {**flags, "store": str(tmp_path / "store"), **more})


def examined(config: Config, *adapters: Path, memory: int = 0) -> list[Check]:
    """What doctor says; it leaves the cache as it was."""
    before = sorted(config.cache.rglob("*")) if config.cache.exists() else None
    found = list(doctor_base.examine(config, adapters, memory))
    assert (sorted(config.cache.rglob("*")) if config.cache.exists() else None) == before
    assert all("\n" not in check.text for check in found)
    return found


def texts(checks: Sequence[Check], subject: str) -> list[str]:
    return [check.text for check in checks if check.subject == subject]


def edited(directory: Path, change: Any, **fields: Any) -> Path:
    """The checkpoint with other tensors and other entries of its configuration."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return directory


# Base models that are served.

SAYS = {
    "gemma2": ("a window of 7 tokens in 2 layers", "before and after blocks", "scores capped at"),
    "gemma3": ("other rotary frequencies for 32 of 32 numbers of a head in 2 layers",),
    "phi4-mini": ("joined qkv_proj and gate_up_proj", "sequences of more than 24 tokens", "tied"),
    "smollm3": ("none in 2 layers", "tied head"),
    "granite": ("embeddings scaled by 3, blocks scaled by 0.4", "logits scaled by 0.25"),
    "olmo2": ("RMSNorm, after blocks", "norms of queries and keys over all heads"),
    "glm": ("in interleaved pairs", "rotary frequencies for 16 of 32 numbers"),
    "starcoder2": ("LayerNorm", "without a gate", "biases of the MLP"),
    "stablelm-parallel": ("attention and MLP in parallel", "with a weight for each"),
    "mixtral": ("a head of its own", "2 of 4 experts"),
    "qwen3-moe": ("3 of 6 experts for each token, each of width 64",),
}


@pytest.mark.parametrize("variant", SAYS)
def test_a_model_is_described_before_it_is_converted(variant: str, tmp_path: Path) -> None:
    directory = variants.write(variant, tmp_path / "model")
    checks = examined(settings(tmp_path, directory))
    assert all(check.good for check in checks)
    (model,) = texts(checks, "model")
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    assert f"{architecture}, will be served; converted at the first start" in model
    (stored,) = texts(checks, "stored as")
    assert stored.startswith("safetensors in 1 file")
    assert stored.endswith("F32 100%")
    said = "; ".join(check.text for check in checks)
    assert [words for words in SAYS[variant] if words not in said] == []


@pytest.mark.parametrize("variant", [*variants.VARIANTS])
def test_sizes_are_those_of_the_converted_model(variant: str, tmp_path: Path) -> None:
    directory = variants.write(variant, tmp_path / "model")
    before = look(str(directory), tmp_path / "cache")
    weights = load.load_base(str(directory), torch.float32, tmp_path / "cache").weights
    after = look(str(directory), tmp_path / "cache")
    assert before is not None
    assert after is not None
    assert before.config == after.config == weights.config
    assert (before.entry, before.fingerprint) == (None, "")
    assert after.fingerprint == weights.fingerprint
    assert 0 <= after.nf4 - before.nf4 < 100_000  # the header of the file, and offsets
    sizes = Footprint.of(weights.config)
    assert sizes.in_memory(4, packed=False) == weights.nbytes


def test_the_memory_of_the_kernels_is_what_they_allocate(tmp_path: Path) -> None:
    """All tensors that the C++ decoder keeps, apart from tables of rotations and padding."""
    directory = variants.write("smollm3", tmp_path / "model")
    weights = load.load_base(str(directory), torch.float32, tmp_path / "cache").weights
    kept = sum(t.nbytes for t in NativeDecoder(weights, 1, 16, 1, max_positions=1)._kept)
    dense = weights.embed.nbytes + weights.lm_head.nbytes
    counted = Footprint.of(weights.config).in_memory(4, packed=True) - dense
    assert kept - weights.embed.nbytes == pytest.approx(counted, rel=0.02)


def test_a_converted_model_is_said_to_be_converted(tmp_path: Path) -> None:
    directory = tiny.write("qwen3", tmp_path / "model")
    config = settings(tmp_path, directory)
    load.load_base(config.model, torch.float32, config.cache)
    checks = examined(config)
    (model,) = texts(checks, "model")
    (entry,) = (tmp_path / "cache" / "entries").glob("*/")
    assert f"will be served; converted already, in {entry}; 1 converted models" in model
    assert "of memory" not in texts(checks, "size")[0]


def test_a_model_that_is_named_by_a_relative_path_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, "model")
    load.load_base(config.model, torch.float32, config.cache)
    assert "converted already" in texts(examined(config), "model")[0]


def test_gguf_files_whole_and_split(tmp_path: Path) -> None:
    whole = gguf_files.write("llama", tmp_path / "m.gguf")
    (stored,) = texts(examined(settings(tmp_path, whole)), "stored as")
    assert stored.startswith("GGUF in 1 file")
    gguf_files.write("llama", tmp_path / "s.gguf", parts=8)
    parts = sorted(tmp_path.glob("s-*.gguf"))
    checks = examined(settings(tmp_path, parts[1]))
    assert all(check.good for check in checks)
    assert texts(checks, "stored as")[0].startswith(f"GGUF in {len(parts)} files")


def test_a_checkpoint_in_nf4_is_called_so(tmp_path: Path) -> None:
    directory = quantised(tiny.write("llama", tmp_path / "model"))
    checks = examined(settings(tmp_path, directory))
    assert all(check.good for check in checks)
    assert "bitsandbytes NF4 " in texts(checks, "stored as")[0]


def quantised(directory: Path) -> Path:
    """The checkpoint with one matrix as bitsandbytes stores it."""
    import bitsandbytes.functional as bnb

    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        packed, state = bnb.quantize_4bit(
            tensors[name], blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    return edited(directory, change)


@pytest.mark.parametrize("model", ["default", "owner/name"])
def test_what_is_not_on_this_machine_is_not_fetched(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("loraplex_model.checkpoints.default_model._download", pytest.fail)
    monkeypatch.setattr("loraplex_model.checkpoints.checkpoint._snapshot", pytest.fail)
    model_check, adapter = examined(settings(tmp_path, model), tmp_path / "adapter")
    assert model_check.good
    assert "not on this machine: fetched at the first start" in model_check.text
    assert "not checked" in adapter.text


# Base models that are refused.


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][:] = float("nan")


REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a tensor too many": (lambda t: t.update({"model.layers.1.x.bias": torch.zeros(4)}), {}),
    "a tensor too few": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), {}),
    "another shape": (lambda t: None, {"intermediate_size": 96}),
    "another architecture": (lambda t: None, {"architectures": ["FalconForCausalLM"]}),
    "epsilon of 0": (lambda t: None, {"rms_norm_eps": 0.0}),
    "code of its own": (lambda t: None, {"auto_map": {"AutoModel": "x.Y"}}),
    "another quantisation": (lambda t: None, {"quantization_config": {"quant_method": "gptq"}}),
    "integers": (lambda t: t.update({EMBED: t[EMBED].to(torch.int8)}), {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_refusal_is_that_of_the_start(case: str, tmp_path: Path) -> None:
    change, fields = REFUSED[case]
    directory = edited(tiny.write("llama", tmp_path / "model"), change, **fields)
    config = settings(tmp_path, directory)
    (check,) = examined(config)
    assert not check.good
    with pytest.raises(Refusal) as caught:
        load.load_base(config.model, torch.float32, tmp_path / "other")
    assert check.text == f"{directory}: {caught.value.reason}: {caught.value.message}"


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
def test_nf4_that_does_not_fit_is_refused_by_its_header(part: str, tmp_path: Path) -> None:
    directory = quantised(tiny.write("llama", tmp_path / "model"))
    name = f"model.layers.1.mlp.up_proj.weight.{part}"
    edited(directory, lambda t: t.update({name: torch.zeros(3)}))
    with pytest.raises(Refusal) as caught:
        survey(SafetensorsSource(directory))
    (check,) = examined(settings(tmp_path, directory))
    assert check.text.endswith(caught.value.message)
    assert "model.layers.1.mlp.up_proj.weight" in check.text


def test_a_missing_model_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = examined(settings(tmp_path, tmp_path / "none"))
    assert not check.good
    assert "MODEL_NOT_FOUND: there is no model at" in check.text
    (tmp_path / "empty").mkdir()
    (check,) = examined(settings(tmp_path, tmp_path / "empty"))
    assert check.text.endswith("has neither config.json nor safetensors")
    directory = tiny.write("llama", tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (check,) = examined(settings(tmp_path, directory))
    assert "CACHE_FAILED: the converted model takes" in check.text


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    (directory / "tokenizer.json").write_text("{")
    (check,) = examined(settings(tmp_path, directory))
    assert not check.good
    assert "MODEL_INVALID: the tokenizer" in check.text


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head is compared with the embeddings at a few places, and NF4's tables are small."""
    directory = quantised(tiny.write("llama", tmp_path / "model"))
    edited(directory, lambda t: t.update({HEAD: t[EMBED].clone()}), tie_word_embeddings=True)
    read: list[str] = []
    plain = SafetensorsSource.read
    monkeypatch.setattr(
        SafetensorsSource,
        "read",
        lambda self, name: (read.append(name), plain(self, name))[1],  # type: ignore[func-returns-value]
    )
    checks = examined(settings(tmp_path, directory))
    assert all(check.good for check in checks)
    assert "also checks values, whether the head equals" in texts(checks, "model")[0]
    tables = ("quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    assert set(read) <= {EMBED, HEAD, *(n for n in read if n.endswith(tables))}
    nan_directory = edited(tiny.write("llama", tmp_path / "nan"), nan)
    assert all(check.good for check in examined(settings(tmp_path, nan_directory)))


def test_samples_of_a_large_head_are_compared(tmp_path: Path) -> None:
    """A head that differs everywhere is found by samples; the conversion compares all of it."""
    directory = tiny.write("llama", tmp_path / "model")
    edited(directory, lambda t: t.update({HEAD: -t[EMBED]}), tie_word_embeddings=True)
    source = SafetensorsSource(directory)
    assert not survey(source, sampled=True).config.tie_embeddings
    assert not survey(source).config.tie_embeddings


# Memory and time.


def test_memory_that_does_not_suffice_is_a_fault(tmp_path: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    (memory,) = [
        check
        for check in examined(settings(tmp_path, directory), memory=100_000_000)
        if check.subject == "memory"
    ]
    assert not memory.good
    assert "the machine has 0.10 GB: lower kv_memory" in memory.text
    small = examined(settings(tmp_path, directory, kv_memory="1MB"), memory=100_000_000)
    assert all(check.good for check in small)


def test_a_step_reads_each_weight_once_and_the_experts_that_are_used() -> None:
    config = config_of("mixtral")
    sizes = Footprint.of(config)
    one, few, many = (sizes.read_in_step(rows, 0, 2) for rows in (1, 2, 100))
    used = (config.num_experts - config.experts_per_token) * sizes.expert
    assert many - one == pytest.approx(used / 2 + used / 64, abs=2)
    assert many == few  # 2 rows of 2 experts each may need all 4
    dense = Footprint.of(config_of("smollm3-window-bias"))
    per_token = 2 * 4 * 2 * dense.config.kv_size
    assert dense.read_in_step(1, 7, 4) - dense.read_in_step(1, 0, 4) == 7 * 4 * per_token / 2
    windowed = dense.read_in_step(1, 100, 4) - dense.read_in_step(1, 7, 4)
    assert windowed == 93 * 2 * 4 * 2 * dense.config.kv_size  # 2 of 4 layers see more than 7


def config_of(variant: str) -> DecoderConfig:
    from loraplex_model.base.hf_config import decoder_config

    return decoder_config(variants.build(variant).config.to_dict() | {"architectures": None})


def test_the_time_of_a_step_is_the_longer_of_reading_and_multiplying(tmp_path: Path) -> None:
    sizes = Footprint.of(config_of("smollm3"))
    fast, slow = DeviceSpeed(1e12, 1e3), DeviceSpeed(1e3, 1e12)
    assert fast.step_seconds(sizes, 2, 0, 4) == sizes.multiplications(2) / 1e3
    assert slow.step_seconds(sizes, 2, 0, 4) == sizes.read_in_step(2, 0, 4) / 1e3
    directory = variants.write("smollm3", tmp_path / "model")
    (step,) = texts(examined(settings(tmp_path, directory, max_running="8")), "step time")
    assert step.startswith("estimated, at least ")
    assert "for 1 sequence and " in step
    assert "for 8 sequences of 256 tokens" in step


@pytest.mark.parametrize("obstacle", [None, "the base model is a mixture of experts"])
def test_on_a_gpu_the_base_decides_with_what_it_is_computed(
    obstacle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[torch.device] = []

    def obstacle_to_kernels(device: torch.device, dtype: Any, config: DecoderConfig) -> str | None:
        asked.append(device)
        return obstacle

    monkeypatch.setattr(support, "obstacle_to_kernels", obstacle_to_kernels)
    directory = tiny.write("llama", tmp_path / "model")
    checks = examined(settings(tmp_path, directory, devices="1"))
    assert asked == [torch.device("cuda", 1)]
    (decoder,) = texts(checks, "decoder")
    slow = f"torch on CUDA, many times slower: {obstacle}"
    assert decoder == (slow if obstacle else "Triton kernels")
    assert texts(checks, "memory")[0].endswith("the cache gets what gpu_memory leaves")
    gone = examined(settings(tmp_path, directory, devices="2"))
    assert not texts(gone, "step time")  # another check names the missing card


# Adapters.


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of the shapes for which `adapter_files` writes adapters."""
    return tiny.write("llama", tmp_path / "model")


def lora(directory: Path, rank: int = 4, **config: Any) -> Path:
    tensors = {}
    random = torch.Generator().manual_seed(0)
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 64, generator=random)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, rank, generator=random)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    own = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8}
    text = json.dumps({**own, "target_modules": ["q_proj"], **config})
    (directory / "adapter_config.json").write_text(text)
    return directory


@pytest.mark.parametrize("converted", [False, True])
def test_an_adapter_is_checked_as_for_a_registration(
    converted: bool, base: Path, tmp_path: Path
) -> None:
    config = settings(tmp_path, base, max_rank="8")
    if converted:
        load.load_base(config.model, torch.float32, config.cache)
    good = lora(tmp_path / "good")
    wide = lora(tmp_path / "wide", rank=16)
    other = lora(tmp_path / "other", peft_type="OFT")
    first, *bad = [c for c in examined(config, good, wide, other) if c.subject == "adapter"]
    assert first.good
    assert "LORA will be served, rank 4, " in first.text
    assert first.text.endswith("changes q_proj")
    info = load.load_base(config.model, torch.float32, tmp_path / "other-cache").weights.info
    wanted = []
    for directory in (wide, other):
        with pytest.raises(Refusal) as caught:
            examine.inspect(directory, info.named(config.model), adapter_limits(config))
        wanted += [f"{directory}: {p.reason}: {p.message}" for p in caught.value.problems]
    assert [check.text for check in bad] == wanted
    assert not any(check.good for check in bad)


def test_a_stamp_is_compared_once_the_base_is_converted(base: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, base)
    stamped = lora(tmp_path / "stamped", loraplex_base_fingerprint="sha256:" + "0" * 64)
    (check,) = [c for c in examined(config, stamped) if c.subject == "adapter"]
    assert check.good
    assert "compared once the model is converted: the base that it was trained on" in check.text
    load.load_base(config.model, torch.float32, config.cache)
    (check,) = [c for c in examined(config, stamped) if c.subject == "adapter"]
    assert not check.good
    assert "BASE_MODEL_MISMATCH" in check.text


def test_copies_of_the_base_are_compared_once_it_is_converted(base: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, base)
    copied = lora(tmp_path / "copied")
    file = copied / "adapter_model.safetensors"
    embed = load_file(base / "model.safetensors")[EMBED]
    save_file({**load_file(file), f"base_model.model.{EMBED}": embed}, file)
    (check,) = [c for c in examined(config, copied) if c.subject == "adapter"]
    assert check.good
    assert "1 tensors that may equal the base's own" in check.text
    load.load_base(config.model, torch.float32, config.cache)
    checks = [c for c in examined(config, copied) if c.subject == "adapter"]
    assert all(check.good for check in checks)
    assert any("left out, since it equals the base's own weight" in c.text for c in checks)


def test_the_command_takes_adapters_and_its_code_says_whether_all_are_served(
    base: Path, tmp_path: Path
) -> None:
    own = ["--model", str(base), "--port", "0", "--admin-port", "0", "--dtype", "float32"]
    for name in ("cache", "store", "import-root"):
        (tmp_path / name).mkdir(exist_ok=True)
        own += [f"--{name}", str(tmp_path / name)]
    good = lora(tmp_path / "good")
    ran = CliRunner().invoke(app, ["doctor", *own, "--adapter", str(good)])
    assert ran.exit_code == 0, ran.output
    (tmp_path / "nothing").mkdir()
    bad = str(tmp_path / "nothing")
    ran = CliRunner().invoke(app, ["doctor", *own, "--adapter", str(good), "--adapter", bad])
    assert ran.exit_code == 1
    assert f"!!  adapter      {bad}: " in ran.output
