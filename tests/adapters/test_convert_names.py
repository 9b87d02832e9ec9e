"""Adapters that differ in names and layout become the adapter that PEFT would have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapters.adapter_files import (
    BASE,
    Tensors,
    everywhere,
    lora_config,
    lora_tensors,
    write_adapter,
)
from loraplex_adapters.convert.importers.rewrite import convert
from loraplex_adapters.format.examine import inspect
from loraplex_model.base.refusal import Refusal
from safetensors.numpy import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adapters import peft_files
from model import tiny

MAX = 1 << 30
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLANS: dict[str, Callable[[str], str]] = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "of several devices": lambda n: f"module.{n}",
    "default": lambda n: n.replace(".weight", ".default.weight"),
    "no prefix": lambda n: n.removeprefix(PREFIX),
    "language model": lambda n: n.replace("model.layers", "model.language_model.layers"),
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """An adapter that PEFT has written for a tiny Llama."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]}
    case = peft_files.lora("llama", {}, **options)
    return peft_files.write(case, tmp_path / "original")


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, dict)
    return config


def other(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / WEIGHTS)
    save_file({change(name): value for name, value in tensors.items()}, target / WEIGHTS)
    return target


def logits(folder: Path) -> torch.Tensor:
    """What PEFT itself computes with an adapter."""
    model = peft.PeftModel.from_pretrained(tiny.build("llama"), str(folder))
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", PLANS.values(), ids=PLANS)
def test_a_renamed_adapter_is_what_peft_wrote(
    change: Callable[[str], str], original: Path, tmp_path: Path
) -> None:
    base = peft_files.base_info("llama")
    foreign = other(original, tmp_path / "foreign", change)
    plan = convert(foreign, tmp_path / "made", base, max_bytes=MAX)
    assert plan.lines
    made, wanted = load_file(tmp_path / "made" / WEIGHTS), load_file(original / WEIGHTS)
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[name], wanted[name]) for name in wanted)
    inspect(tmp_path / "made", base)
    assert torch.equal(logits(tmp_path / "made"), logits(original))


def test_an_adapter_of_mlx_computes_what_peft_does(original: Path, tmp_path: Path) -> None:
    base, folder = peft_files.base_info("llama"), tmp_path / "mlx"
    folder.mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {
            name.removeprefix(PREFIX)
            .replace("lora_A.weight", "lora_a")
            .replace("lora_B.weight", "lora_b"): np.ascontiguousarray(value.T)
            for name, value in load_file(original / WEIGHTS).items()
        },
        folder / "adapters.safetensors",
    )
    convert(folder, tmp_path / "made", base, max_bytes=MAX)
    assert config_of(tmp_path / "made")["lora_alpha"] == 6
    inspect(tmp_path / "made", base)
    assert torch.equal(logits(tmp_path / "made"), logits(original))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 1.5}}, "dora"),
        ({"lora_parameters": {"rank": 4, "scale": 1.5, "alpha": 8}}, "--alpha"),
        ({"lora_parameters": {"rank": 4}}, "--alpha"),
    ],
)
def test_an_mlx_adapter_whose_scale_is_not_known_is_refused(
    settings: dict[str, Any], word: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    at = "model.layers.0.mlp.down_proj"
    tensors = {f"{at}.lora_a": np.ones((48, 4), "f2"), f"{at}.lora_b": np.ones((4, 32), "f2")}
    save_file(tensors, tmp_path / "adapters.safetensors")
    with pytest.raises(Refusal) as refused:
        convert(tmp_path, tmp_path / "made", BASE, max_bytes=MAX)
    assert refused.value.reason == "CONVERT_UNSUPPORTED"
    assert word in refused.value.message
    if word == "--alpha":
        convert(tmp_path, tmp_path / "made", BASE, alpha=3.0, max_bytes=MAX)
        assert config_of(tmp_path / "made")["lora_alpha"] == 3


def mistral(folder: Path, tensors: Tensors, scaling: float | None = 2.0) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    if scaling is not None:
        params = {"lora": {"enable": True, "rank": 4, "scaling": scaling}}
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def pairs_rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Mistral's rotation: neighbouring numbers are the parts of a complex number."""
    parts = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    turned = parts * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def test_queries_and_keys_of_mistral_meet_as_in_its_own_layout(tmp_path: Path) -> None:
    config = BASE.config
    heads, kv, width = config.num_heads, config.num_kv_heads, config.head_dim
    rng = np.random.default_rng(0)
    shapes = {"wq": heads * width, "wk": kv * width}
    tensors = {}
    for name, rows in shapes.items():
        at = f"layers.0.attention.{name}"
        tensors[f"{at}.lora_A.weight"] = rng.normal(size=(4, config.hidden_size)).astype("f4")
        tensors[f"{at}.lora_B.weight"] = rng.normal(size=(rows, 4)).astype("f4")
    convert(mistral(tmp_path / "m", tensors), tmp_path / "made", BASE, max_bytes=MAX)
    inspect(tmp_path / "made", BASE)
    made = load_file(tmp_path / "made" / WEIGHTS)
    x = torch.randn(6, config.hidden_size, generator=torch.Generator().manual_seed(1))

    def projected(held: Tensors, path: str, count: int) -> torch.Tensor:
        a = torch.from_numpy(held[f"{path}.lora_A.weight"]).double()
        b = torch.from_numpy(held[f"{path}.lora_B.weight"]).double()
        return (x.double() @ a.T @ b.T).reshape(6, count, width).transpose(0, 1)[None]

    angles = torch.outer(torch.arange(6.0), torch.tensor(config.rope_inv_freq)).double()
    q = projected(tensors, "layers.0.attention.wq", heads)
    k = projected(tensors, "layers.0.attention.wk", kv)
    theirs = pairs_rotated(q, angles)[:, :kv] @ pairs_rotated(k, angles).mT
    at = f"{PREFIX}model.layers.0.self_attn"
    both = torch.cat([angles, angles], -1)[None]
    q = projected(made, f"{at}.q_proj", heads)[:, :kv]
    k = projected(made, f"{at}.k_proj", kv)
    q, k = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    torch.testing.assert_close(q @ k.mT, theirs, rtol=1e-9, atol=1e-9)
    assert config_of(tmp_path / "made")["lora_alpha"] == 8


def test_the_other_modules_of_mistral_are_renamed(tmp_path: Path) -> None:
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    wanted = lora_tensors(everywhere(*names.values()))
    back = {theirs: ours for ours, theirs in names.items()}

    def theirs(name: str) -> str:
        for module, word in back.items():
            name = name.replace(f"mlp.{module}", f"feed_forward.{word}")
        return name.removeprefix(PREFIX + "model.")

    source = mistral(tmp_path / "m", {theirs(n): v for n, v in wanted.items()}, None)
    with pytest.raises(Refusal, match="--alpha"):
        convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    with pytest.raises(Refusal, match="--rank"):
        convert(source, tmp_path / "made", BASE, rank=8, alpha=8.0, max_bytes=MAX)
    convert(source, tmp_path / "made", BASE, rank=4, alpha=8.0, max_bytes=MAX)
    made = load_file(tmp_path / "made" / WEIGHTS)
    assert made.keys() == wanted.keys()
    assert all(np.array_equal(made[name], wanted[name]) for name in wanted)
    assert inspect(tmp_path / "made", BASE).rank == 4


def test_the_head_of_tinker_becomes_the_head(tmp_path: Path) -> None:
    tensors = lora_tensors(everywhere("down_proj"))
    tensors[f"{PREFIX}model.unembed_tokens.lora_A.weight"] = np.ones((4, 32), np.float32)
    tensors[f"{PREFIX}model.unembed_tokens.lora_B.weight"] = np.ones((40, 4), np.float32)
    source = write_adapter(tmp_path / "t", lora_config(target_modules="all-linear"), tensors)
    convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    assert "lm_head" in inspect(tmp_path / "made", BASE).target_modules
    assert "lm_head" in config_of(tmp_path / "made")["target_modules"]


def test_several_weights_files_are_joined(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "s")
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    for n, half in ((1, "lora_A"), (2, "lora_B")):
        part = {name: value for name, value in tensors.items() if half in name}
        save_file(part, source / f"adapter_model-0000{n}-of-00002.safetensors")
    convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    made = load_file(tmp_path / "made" / WEIGHTS)
    assert all(np.array_equal(made[name], tensors[name]) for name in tensors)
    (source / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refusal, match="weights files in the folder: 1"):
        convert(source, tmp_path / "again", BASE, max_bytes=MAX)


def test_a_single_file_with_a_number_gets_its_usual_name(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "s")
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).rename(source / "adapter_model-00001-of-00001.safetensors")
    [line] = convert(source, tmp_path / "made", BASE, max_bytes=MAX).lines
    assert line == f"adapter_model-00001-of-00001.safetensors becomes {WEIGHTS}"
    made = load_file(tmp_path / "made" / WEIGHTS)
    assert all(np.array_equal(made[name], tensors[name]) for name in tensors)
    assert inspect(tmp_path / "made", BASE).rank


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "s")
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).unlink()
    for n in (1, 2):
        (source / f"adapter_model-0000{n}-of-00002.safetensors").write_bytes(content)
    with pytest.raises(Refusal, match="is in adapter_model-00001-of-00002"):
        convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    assert not (tmp_path / "made").exists()


def test_weights_files_are_bounded_together(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "s")
    weights = source / WEIGHTS
    size = weights.stat().st_size
    for n in (1, 2):
        (source / f"adapter_model-0000{n}-of-00002.safetensors").write_bytes(weights.read_bytes())
    weights.unlink()
    with pytest.raises(Refusal, match="together") as refused:
        convert(source, tmp_path / "made", BASE, max_bytes=2 * size - 1)
    assert refused.value.reason == "ADAPTER_TOO_LARGE"
    assert not (tmp_path / "made").exists()


def test_an_adapter_in_a_hubs_cache_is_converted(original: Path, tmp_path: Path) -> None:
    other(original, tmp_path / "plain", lambda name: name.removeprefix("base_model.model."))
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--n" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for n, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(blobs / str(n))
        (snapshot / file.name).symlink_to(f"../../blobs/{n}")
    assert convert(snapshot, tmp_path / "made", BASE, max_bytes=MAX).lines
    assert torch.equal(logits(tmp_path / "made"), logits(original))
    (blobs / "0").rename(tmp_path / "outside")
    (blobs / "0").symlink_to("../../outside")
    with pytest.raises(Refusal, match="symbolic link"):
        convert(snapshot, tmp_path / "again", BASE, max_bytes=MAX)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(everywhere("down_proj"))
    both = {
        name.replace(".weight", f".{adapter}.weight"): value
        for name, value in tensors.items()
        for adapter in ("first", "second")
    }
    source = write_adapter(tmp_path / "b", weights=both)
    with pytest.raises(Refusal, match="first, second") as refused:
        convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    assert refused.value.reason == "CONVERT_UNSUPPORTED"


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "p")
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(Refusal, match="weights_only=True") as refused:
        convert(source, tmp_path / "made", BASE, max_bytes=MAX)
    assert refused.value.reason == "ADAPTER_UNSUPPORTED"
    assert not (tmp_path / "made").exists()
