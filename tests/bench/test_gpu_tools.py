"""Compiling kernels ahead of time, and what a machine with a GPU is given; neither needs Triton."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gpu_aot
import numpy as np
import pytest
import torch
from gpu import inputs, references
from gpu.usage import SHARED_KB, Usage, of_log
from loraplex_model.ops import nf4

ROOT = Path(__file__).resolve().parents[2]

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


@pytest.fixture
def pack() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_pack", ROOT / "scripts" / "gpu_pack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_prints_is_read() -> None:
    assert of_log(LOG) == {"registers": 168, "stack": 16, "spilled": 12}
    with pytest.raises(AssertionError, match="something else"):
        of_log("ptxas info    : Used 168 registers")


def test_spills_of_hot_kernels_and_too_much_shared_memory_are_problems() -> None:
    assert not Usage("attend", True, 90, registers=255).problem(227)
    assert Usage("attend", True, 90, spilled=4).problem(227) == "spills 4 bytes"
    assert not Usage("unpack", False, 90, spilled=4).problem(227)
    assert not Usage("attend", True, 120, shared=99 << 10).problem(SHARED_KB[120])
    assert "shared memory" in Usage("attend", True, 120, shared=(99 << 10) + 1).problem(99)
    assert Usage("attend", False, 90, error="no such type").problem(227) == "no such type"


def test_the_table_has_a_row_for_each_configuration_of_each_release() -> None:
    usages = [
        Usage("attend", True, capability, registers=100 + i, shared=2048, product="mma")
        for i, capability in enumerate(SHARED_KB)
    ]
    page = gpu_aot.document({"3.7.1": usages, "3.6.0": usages})
    row = "| `attend` * | 100, 2 K, mma | 101, 2 K, mma | 102, 2 K, mma |"
    assert page.splitlines().count(row) == 2
    assert "| configuration | sm_80 | sm_90 | sm_120 |" in page


def test_the_committed_table_shows_no_fault() -> None:
    page = gpu_aot.RESULT.read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    assert "does not compile" not in page
    assert not [row for row in rows if "` * |" in row and "spills" in row]


def test_libraries_for_other_cuda_releases_stay_behind(pack: ModuleType) -> None:
    is_wanted = pack.wanted_files("130")
    names = ["libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so", "functional.py", "METADATA"]
    assert all(is_wanted(f"bitsandbytes/{name}") for name in names)
    others = ["libbitsandbytes_cuda124.so", "libbitsandbytes_rocm62.so", "libbitsandbytes_xpu.so"]
    assert not any(is_wanted(f"bitsandbytes/{name}") for name in others)


def test_packages_travel_in_the_locked_versions(pack: ModuleType) -> None:
    for package in pack.WHEELS:
        assert pack.pinned(package).startswith(f"{package}==")
    with pytest.raises(SystemExit, match="not in requirements"):
        pack.pinned("no-such-package")


def test_a_base_model_is_the_same_after_a_journey_in_a_file(tmp_path: Path) -> None:
    weights = inputs.random_weights(inputs.TINY, torch.float32, "cpu")
    biases = {"input_layernorm": torch.randn(inputs.TINY.hidden_size)}
    weights = replace(
        weights,
        layers=tuple(replace(layer, norm_biases=biases) for layer in weights.layers),
        norm_bias=torch.randn(inputs.TINY.hidden_size),
    )
    np.savez_compressed(tmp_path / "ref.npz", **references.as_arrays(weights))
    arrays = dict(np.load(tmp_path / "ref.npz"))
    again = references.of_arrays(arrays, "cpu", torch.float32)
    assert again.config == weights.config
    assert {*references.as_arrays(again)} == {*arrays}
    for name, array in references.as_arrays(again).items():
        assert np.array_equal(array, arrays[name]), name
    for layer, own in zip(again.layers, weights.layers, strict=True):
        for fused in ("qkv", "o", "gate_up", "down"):
            found, wanted = getattr(layer, fused), getattr(own, fused)
            assert torch.equal(nf4.dequantize(found), nf4.dequantize(wanted))


def test_synthetic_weights_keep_the_size_of_activations() -> None:
    matrix = inputs.random_matrix((96, 32), 192, "cpu", std=0.05)
    weight = nf4.dequantize(matrix)
    assert weight.shape == (128, 192)
    assert 0.04 < weight.std().item() < 0.06
    assert abs(weight.mean().item()) < 0.01
