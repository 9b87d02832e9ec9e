"""Loading: the tensors are exactly the content of the digest, or loading fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters.adapter_files import (
    entries,
    everywhere,
    key,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    write_adapter,
)
from adapters.peft_files import base_info
from adapters.peft_kinds import Gallery
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.load.tensors import load
from loraplex_model.base.refusal import Refusal
from loraplex_model.base.weights import BaseWeights

BASE = base_info("llama")
MODULES = everywhere("q_proj", "v_proj", layers=3)


@pytest.fixture(scope="module")
def weights(gallery: Gallery) -> BaseWeights:
    return gallery.weights("llama")


def write(directory: Path, **changes: object) -> Path:
    return write_adapter(directory, lora_config(**changes), lora_tensors(MODULES, BASE))


def test_a_loaded_adapter_has_the_files_tensors_and_scales(
    tmp_path: Path, weights: BaseWeights
) -> None:
    tensors = lora_tensors(MODULES, BASE)
    spec = inspect(write(tmp_path, lora_alpha=6), BASE)
    again, delta = load(tmp_path, spec.digest, weights)
    assert again == spec
    assert delta.sites.keys() == MODULES.keys()
    for (layer, module), change in delta.sites.items():
        np.testing.assert_array_equal(change.a, tensors[key(layer, module, "A")])
        np.testing.assert_array_equal(change.b, tensors[key(layer, module, "B")].T * 1.5)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "append", "cut", "remove"])
def test_changed_bytes_are_never_used(
    file: str, harm: str, tmp_path: Path, weights: BaseWeights
) -> None:
    spec = inspect(write(tmp_path), BASE)
    data = (tmp_path / file).read_bytes()
    changed = {"flip": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], "append": data + b" "}
    if harm == "remove":
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(changed.get(harm, data[:-1]))
    with pytest.raises(Refusal) as refused:
        load(tmp_path, spec.digest, weights)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_CORRUPT", spec.digest)


def test_an_adapter_of_another_base_is_refused_at_load(
    tmp_path: Path, weights: BaseWeights
) -> None:
    digest = inspect(write(tmp_path), BASE).digest
    wider = replace(weights.config, hidden_size=2 * weights.config.hidden_size)
    with pytest.raises(Refusal) as refused:
        load(tmp_path, digest, replace(weights, config=wider))
    assert refused.value.reason == "BASE_MODEL_MISMATCH"


def test_tensors_that_lie_unaligned_are_read_right(tmp_path: Path, weights: BaseWeights) -> None:
    tensors = lora_tensors(MODULES, BASE)
    text = dict(entries(tensors))
    for padding in range(8):
        header = {"__metadata__": {"p": "x" * padding}, **text}
        data = safetensors_bytes(header, b"".join(t.tobytes() for t in tensors.values()))
        spec = inspect(write_adapter(tmp_path, lora_config(), data), BASE)
        change = load(tmp_path, spec.digest, weights)[1].sites[1, "v_proj"]
        assert change.a.data_ptr() % 4 == 0
        assert torch.equal(change.a, torch.from_numpy(tensors[key(1, "v_proj", "A")]))
