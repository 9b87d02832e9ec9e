"""Loading: the tensors are the bytes that the digest names, or there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapters.adapter_files import (
    BASE,
    entries,
    everywhere,
    key,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    write_adapter,
)
from loraplex_adapters.errors import AdapterError
from loraplex_adapters.format import inspect
from loraplex_adapters.spec import BaseShapes
from loraplex_adapters.tensors import load, load_blob


def test_a_loaded_adapter_has_the_files_tensors_and_scales(tmp_path: Path) -> None:
    tensors = lora_tensors(everywhere("q_proj", "v_proj"))
    spec = inspect(write_adapter(tmp_path, lora_config(lora_alpha=6), tensors), BASE)
    again, factors = load_blob(tmp_path, spec.digest, BASE)
    assert again == spec
    assert factors.keys() == everywhere("q_proj", "v_proj").keys()
    for (layer, module), lora in factors.items():
        np.testing.assert_array_equal(lora.a.numpy(), tensors[key(layer, module, "A")])
        np.testing.assert_array_equal(lora.b.numpy(), tensors[key(layer, module, "B")])
        assert lora.scale == 1.5


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "append", "cut", "remove"])
def test_changed_bytes_are_never_used(file: str, harm: str, tmp_path: Path) -> None:
    spec = inspect(write_adapter(tmp_path), BASE)
    data = (tmp_path / file).read_bytes()
    changed = {"flip": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], "append": data + b" "}
    if harm == "remove":
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(changed.get(harm, data[:-1]))
    for attempt in (
        lambda: load(tmp_path, spec),
        lambda: load_blob(tmp_path, spec.digest, BASE),
    ):
        with pytest.raises(AdapterError) as refused:
            attempt()
        assert (refused.value.reason, refused.value.field) == ("ADAPTER_CORRUPT", spec.digest)


def test_a_blob_of_another_base_is_refused_at_load(tmp_path: Path) -> None:
    digest = inspect(write_adapter(tmp_path), BASE).digest
    wider = {name: (i * 2, o * 2) for name, (i, o) in BASE.projections.items()}
    with pytest.raises(AdapterError) as refused:
        load_blob(tmp_path, digest, BaseShapes(2, wider))
    assert refused.value.reason == "BASE_MODEL_MISMATCH"


def test_tensors_that_lie_unaligned_are_read_right(tmp_path: Path) -> None:
    tensors = lora_tensors(everywhere("q_proj", "v_proj"))
    text = dict(entries(tensors))
    for padding in range(8):
        header = {"__metadata__": {"p": "x" * padding}, **text}
        data = safetensors_bytes(header, b"".join(t.tobytes() for t in tensors.values()))
        spec = inspect(write_adapter(tmp_path, weights=data), BASE)
        factors = load(tmp_path, spec)
        assert factors[1, "v_proj"].b.data_ptr() % 4 == 0
        assert torch.equal(factors[1, "v_proj"].b, torch.from_numpy(tensors[key(1, "v_proj", "B")]))
