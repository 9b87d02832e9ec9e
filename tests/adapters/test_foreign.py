"""Files of other programs are refused with what they are and what to do, and findings in groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import loraplex.folder as clients_copy
import numpy as np
import pytest
from adapters.adapter_files import (
    BASE,
    Tensors,
    everywhere,
    lora_config,
    lora_tensors,
    weights_bytes,
    write_adapter,
)
from hypothesis import given
from hypothesis import strategies as st
from loraplex_adapters.format.examine import examine
from loraplex_adapters.format.foreign import folder as servers_copy
from loraplex_adapters.format.foreign.causes import grouped
from loraplex_adapters.format.foreign.names import spelling
from loraplex_adapters.format.spec import TensorLocation
from loraplex_model.base.refusal import Problem, Reason

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSORS = lora_tensors(everywhere("down_proj"))
GOOD = weights_bytes(TENSORS)
PREFIX = "base_model.model."


def test_client_and_server_look_at_folders_alike() -> None:
    ours, theirs = Path(str(servers_copy.__file__)), Path(str(clients_copy.__file__))
    assert ours.read_text() == theirs.read_text()


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): value for name, value in TENSORS.items()}


WRAPPED: dict[str, tuple[Callable[[str], str], str, str]] = {
    "compiled": (lambda n: f"_orig_mod.{n}", "ADAPTER_INVALID", "_orig_mod."),
    "compiled inside": (
        lambda n: n.replace("model.model.", "model._orig_mod.model."),
        "ADAPTER_INVALID",
        "_orig_mod.",
    ),
    "of several devices": (lambda n: f"module.{n}", "ADAPTER_INVALID", "several devices"),
    "sharded": (
        lambda n: f"_fsdp_wrapped_module.{n}",
        "ADAPTER_INVALID",
        "several devices",
    ),
    "default": (lambda n: n.replace(".weight", ".default.weight"), "ADAPTER_INVALID", "(default)"),
    "a name": (lambda n: n.replace(".weight", ".my_name.weight"), "ADAPTER_INVALID", "(my_name)"),
    "no prefix": (lambda n: n.removeprefix(PREFIX), "ADAPTER_INVALID", "lack PEFT's prefix"),
    "twice": (lambda n: f"{PREFIX}{n}", "ADAPTER_INVALID", "in another form"),
    "one more": (lambda n: n.replace("model.model.", "model.model.model.", 1), "ADAPTER_INVALID",
                 "in another form"),
    "language model": (
        lambda n: n.replace("model.layers", "model.language_model.layers"),
        "BASE_MODEL_MISMATCH",
        "multimodal",
    ),
    "language model outside": (
        lambda n: n.replace("model.model.layers", "model.language_model.model.layers"),
        "BASE_MODEL_MISMATCH",
        "multimodal",
    ),
    "two at once": (
        lambda n: f"_orig_mod.{n}".replace(".weight", ".default.weight"),
        "ADAPTER_INVALID",
        "_orig_mod.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "word"), WRAPPED.values(), ids=WRAPPED)
def test_names_with_additions_are_one_finding_with_the_way_out(
    change: Callable[[str], str], reason: str, word: str, tmp_path: Path
) -> None:
    tensors = renamed(change)
    folder = write_adapter(tmp_path, lora_config(target_modules=["down_proj"]), tensors)
    (only,) = examine(folder, BASE).findings
    assert only.reason == reason
    assert only.field in tensors
    assert word in only.message
    assert f"{len(tensors)} tensors, for example {only.field}" in only.message
    assert "store import --convert" in only.message
    assert {spelling(name).name for name in tensors} == set(TENSORS)  # type: ignore[union-attr]


def matrix(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


FORMS: dict[str, tuple[str, str, str]] = {
    "mlx": ("model.layers.0.mlp.down_proj.lora_a", "ADAPTER_UNSUPPORTED", "MLX"),
    "mistral": (
        "layers.0.attention.wq.lora_A.weight",
        "ADAPTER_UNSUPPORTED",
        "mistral-finetune",
    ),
    "torchtune": ("layers.0.attn.q_proj.lora_a.weight", "ADAPTER_UNSUPPORTED", "torchtune"),
    "litgpt": ("transformer.h.0.attn.qkv.lora_A", "ADAPTER_UNSUPPORTED", "LitGPT"),
    "unet": ("lora_unet_down_blocks_0_attn.lora_down.weight", "BASE_MODEL_MISMATCH", "images"),
    "text encoder": ("lora_te_text_model_0.lora_up.weight", "BASE_MODEL_MISMATCH", "images"),
    "diffusers": (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "BASE_MODEL_MISMATCH",
        "images",
    ),
    "vision": (
        f"{PREFIX}model.visual.blocks.0.attn.qkv.lora_A.weight",
        "BASE_MODEL_MISMATCH",
        "reads images",
    ),
    "experts": (
        f"{PREFIX}model.layers.0.mlp.experts.3.up_proj.lora_A.weight",
        "BASE_MODEL_MISMATCH",
        "experts",
    ),
    "another architecture": (
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight",
        "BASE_MODEL_MISMATCH",
        "another architecture",
    ),
    "a whole model": (
        "model.layers.0.mlp.down_proj.weight",
        "ADAPTER_UNSUPPORTED",
        "whole model",
    ),
}


@pytest.mark.parametrize(("name", "reason", "word"), FORMS.values(), ids=FORMS)
def test_names_of_other_programs_are_said_to_be_theirs(
    name: str, reason: str, word: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, weights={name: matrix(2, 32)})
    first = examine(folder, BASE).findings[0]
    assert (first.reason, first.field) == (reason, name)
    assert word in first.message
    assert "; " in first.message  # what to do


@pytest.mark.parametrize("name", [*TENSORS, f"{PREFIX}model.embed_tokens.weight"])
def test_names_of_peft_stay_as_they_are(name: str) -> None:
    found = spelling(name)
    assert found is not None
    assert (found.name, found.wrappers, found.adapter) == (name, (), "")


@given(name=st.text(max_size=200))
def test_any_text_has_one_spelling_which_does_not_change_again(name: str) -> None:
    found = spelling(name)
    if found is not None:
        again = spelling(found.name)
        assert again is not None
        assert again.name == found.name or again.adapter


def test_a_resized_vocabulary_is_said_with_both_sizes(tmp_path: Path) -> None:
    tensors = {**TENSORS, f"{PREFIX}model.embed_tokens.weight": matrix(104, 32)}
    config = lora_config(target_modules=["down_proj"], modules_to_save=["embed_tokens"])
    (only,) = examine(write_adapter(tmp_path, config, tensors), BASE).findings
    assert only.reason == "BASE_MODEL_MISMATCH"
    assert "vocabulary of 104 tokens, 64 more than the 40" in only.message
    assert "resize_token_embeddings" in only.message


def test_a_type_that_is_not_served_comes_before_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, lora_config(peft_type="FOURIERFT"))
    whole = weights_bytes(TENSORS).replace(b'"F32"', b'"F8E"')
    (folder / WEIGHTS).write_bytes(whole)
    found = examine(folder, BASE).findings
    assert found[0].field == "peft_type"
    assert len(found) == 2


def test_a_module_that_is_never_saved_completely_is_not_called_foreign(tmp_path: Path) -> None:
    config = lora_config(target_modules=["down_proj"], modules_to_save=["mlp"])
    first = examine(write_adapter(tmp_path, config, TENSORS), BASE).findings[0]
    assert (first.reason, first.field) == ("ADAPTER_UNSUPPORTED", "modules_to_save")
    assert "only embeddings, head and norms are served" in first.message


CONFIGS: dict[str, tuple[Mapping[str, object], str]] = {
    "mlx": ({"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}, "MLX"),
    "adapterhub": ({"config": {"reduction_factor": 4}, "model_type": "llama"}, "AdapterHub"),
    "a model": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 32}, "config.json"),
}


@pytest.mark.parametrize(("config", "word"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_another_program_is_said_to_be_its(
    config: Mapping[str, object], word: str, tmp_path: Path
) -> None:
    first = examine(write_adapter(tmp_path, config), BASE).findings[0]
    assert (first.reason, first.field) == ("ADAPTER_UNSUPPORTED", "peft_type")
    assert word in first.message


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
CONTENTS: dict[str, tuple[str, bytes, str, str]] = {
    "a pointer": (WEIGHTS, LFS, "ADAPTER_INVALID", "git lfs pull"),
    "a pointer as configuration": (CONFIG, LFS, "ADAPTER_INVALID", "git lfs pull"),
    "a page": (WEIGHTS, b"\n<!DOCTYPE html><html>", "ADAPTER_INVALID", "web page"),
    "a page as configuration": (CONFIG, b"<html></html>", "ADAPTER_INVALID", "web page"),
    "nothing": (WEIGHTS, b"", "ADAPTER_INVALID", "is empty"),
    "nothing as configuration": (CONFIG, b"", "ADAPTER_INVALID", "is empty"),
    "a message": (WEIGHTS, b"Entry not found", "ADAPTER_INVALID", "Entry not found"),
    "gguf": (WEIGHTS, b"GGUF\x03\0\0\0" + bytes(40), "ADAPTER_UNSUPPORTED", "GGUF"),
    "gzip": (WEIGHTS, b"\x1f\x8b\x08" + bytes(40), "ADAPTER_INVALID", "unpack"),
    "a pickle": (WEIGHTS, b"PK\x03\x04" + bytes(40), "ADAPTER_UNSUPPORTED", "weights_only=True"),
}


@pytest.mark.parametrize(("name", "data", "reason", "word"), CONTENTS.values(), ids=CONTENTS)
def test_what_is_there_instead_of_a_file_is_recognised(
    name: str, data: bytes, reason: str, word: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path)
    (folder / name).write_bytes(data)
    (only,) = examine(folder, BASE).findings
    assert (only.reason, only.field) == (reason, name)
    assert word in only.message


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x8B1F, 0x2020])
def test_a_header_length_that_looks_like_a_mark_is_a_length(length: int, tmp_path: Path) -> None:
    size = int.from_bytes(GOOD[:8], "little")
    padded = length.to_bytes(8, "little") + GOOD[8 : 8 + size].ljust(length) + GOOD[8 + size :]
    config = lora_config(target_modules=["down_proj"])
    assert examine(write_adapter(tmp_path, config, padded), BASE).spec is not None


LORA = json.dumps(lora_config()).encode()
FOLDERS: dict[str, tuple[dict[str, bytes], str, str]] = {
    "one deeper": (
        {"support/" + CONFIG: LORA, "support/" + WEIGHTS: GOOD},
        "ADAPTER_INVALID",
        "adapter in support/",
    ),
    "two deeper": ({"run/support/" + CONFIG: LORA}, "ADAPTER_INVALID", "in run/support/"),
    "checkpoints": (
        {f"checkpoint-{n}/{CONFIG}": LORA for n in (500, 1500, 1000, 2000, 2500)},
        "ADAPTER_INVALID",
        "checkpoint-2500/, checkpoint-2000/, checkpoint-1500/ and 2 more",
    ),
    "zip": ({"adapter.zip": b"PK"}, "ADAPTER_INVALID", "adapter.zip is an archive"),
    "tar": ({"adapter.tar.gz": b"\x1f\x8b"}, "ADAPTER_INVALID", "unpack it"),
    "configuration only": ({CONFIG: LORA}, "ADAPTER_INVALID", f"there is no {WEIGHTS}"),
    "weights only": ({WEIGHTS: GOOD}, "ADAPTER_INVALID", f"there is no {CONFIG}"),
    "mlx": ({CONFIG: LORA, "adapters.safetensors": GOOD}, "ADAPTER_UNSUPPORTED", "MLX"),
    "mistral": ({"lora.safetensors": GOOD}, "ADAPTER_UNSUPPORTED", "mistral-finetune"),
    "adapterhub": (
        {CONFIG: LORA, "adapter.safetensors": GOOD},
        "ADAPTER_UNSUPPORTED",
        "convert --from adapterhub",
    ),
    "shards": (
        {CONFIG: LORA, "adapter_model-00001-of-00002.safetensors": GOOD},
        "ADAPTER_UNSUPPORTED",
        "--convert",
    ),
    "a whole model": (
        {"config.json": b"{}", "model-00001-of-00002.safetensors": GOOD},
        "ADAPTER_UNSUPPORTED",
        "a whole model",
    ),
    "a pickled model": (
        {"config.json": b"{}", "pytorch_model.bin": b"x"},
        "ADAPTER_UNSUPPORTED",
        "a whole model",
    ),
    "a pickle": (
        {CONFIG: LORA, "adapter_model.bin": b"x", "training_args.bin": b"x"},
        "ADAPTER_UNSUPPORTED",
        "torch.load('adapter_model.bin'",
    ),
    "gguf": ({CONFIG: LORA, "support-f16.gguf": b"GGUF"}, "ADAPTER_UNSUPPORTED", "llama.cpp"),
    "another name": (
        {CONFIG: LORA, "pirate.safetensors": GOOD},
        "ADAPTER_INVALID",
        "but pirate.safetensors; rename it",
    ),
    "nothing of it": ({"notes.txt": b"x", "b.txt": b""}, "ADAPTER_INVALID", "it holds b.txt and 1"),
}


@pytest.mark.parametrize(("files", "reason", "word"), FOLDERS.values(), ids=FOLDERS)
def test_what_a_folder_holds_instead_of_an_adapter_is_said(
    files: dict[str, bytes], reason: str, word: str, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found = examine(tmp_path, BASE).findings
    assert len(found) == 1
    assert found[0].reason == reason
    assert word in found[0].message


def test_a_folder_of_many_folders_is_searched_within_a_bound() -> None:
    asked: list[str] = []

    def listing(below: str) -> list[tuple[str, bool]]:
        asked.append(below)
        return [(f"d{n}", True) for n in range(1000)]

    assert servers_copy.cause_of(listing) is not None
    assert len(asked) <= 201


def test_many_findings_of_one_kind_are_one_and_few_are_listed() -> None:
    names = [f"a.layers.{n}.x" for n in range(40)]
    tensors = [TensorLocation(name, "F32", (1,), 0, 4) for name in names]
    many = [
        Problem(name, f"{name} has width {n % 2}", Reason.BASE_MODEL_MISMATCH)
        for n, name in enumerate(names)
    ]
    first, second = grouped(many, tensors)
    assert first.message == "20 tensors: each has width 0, for example a.layers.0.x"
    assert second.field == "a.layers.1.x"
    assert sorted(grouped(many[:5], tensors), key=many.index) == many[:5]
    options = [Problem(f"o{n}", f"o{n} is unknown", Reason.ADAPTER_UNSUPPORTED) for n in range(40)]
    assert grouped(options, tensors) == options


def test_a_wrong_rank_of_many_modules_is_one_finding(tmp_path: Path) -> None:
    modules = everywhere("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    folder = write_adapter(tmp_path, lora_config(r=8, target_modules=".*"), lora_tensors(modules))
    (only,) = [f for f in examine(folder, BASE).findings if f.field == "r"]
    assert "has rank 4 in the weights and 8 in adapter_config.json" in only.message
    assert "9 more findings like this one" in only.message
