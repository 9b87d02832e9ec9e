"""The fingerprint of a base names its content and nothing else, so that it can be compared; R16."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters.adapter_files import base_info
from loraplex_model.checkpoints.load import load_base
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from loraplex_model.checkpoints.stored import StoredWriter
from safetensors.torch import load_file, save_file

from model import tiny

SCRIPT = """
import sys, torch
from pathlib import Path
from loraplex_model.checkpoints.load import load_base
print(load_base(sys.argv[1], torch.bfloat16, Path(sys.argv[2])).weights.fingerprint)
"""


@pytest.mark.fault("base-changed-under-store")
@pytest.mark.parametrize("variant", ["qwen3-window-bias", "llama"])
def test_the_fingerprint_depends_on_the_weights_and_not_on_type_cache_or_start(
    tmp_path: Path, variant: str
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    tiny.write(variant, model)
    first = load_base(str(model), torch.float32, cache).weights.fingerprint
    for dtype in (torch.float32, torch.bfloat16):
        assert load_base(str(model), dtype, cache).weights.fingerprint == first
        fresh = tmp_path / f"cache-{dtype}"
        assert load_base(str(model), dtype, fresh).weights.fingerprint == first
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert (
        load_base(str(moved), torch.float32, tmp_path / "cache-moved").weights.fingerprint == first
    )
    # Another start, with other vectors and another order of hashes.
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "cache-process")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == first

    file = moved / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    other = load_base(str(moved), torch.float32, tmp_path / "cache-moved").weights.fingerprint
    assert other != first


@pytest.mark.fault("base-changed-under-store")
def test_the_fingerprint_of_a_configuration_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """If a field added to `DecoderConfig` changed it, every stored adapter would be refused."""
    with SafetensorsFile(tmp_path / "weights", most_tensors=1) as file:
        written = StoredWriter(file, base_info(architecture="tiny").config)
        file.add("any", torch.zeros(1))
    assert written.fingerprint == (
        "sha256:a4df30007dbd212c7791f08709959514f24bfd6265812edcf73f99ac5ecb2b8a"
    )
