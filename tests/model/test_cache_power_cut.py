"""Caches after a loss of power: an entry is complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from loraplex_model.checkpoints.cache import entry_for, is_whole
from loraplex_model.ops import build as kernels
from power.recorder import Recorder
from power.replay import replay
from torch.utils import cpp_extension

pytestmark = pytest.mark.fault("power-cut")

BUILT = bytes(range(256)) * 40


def build(folder: Path) -> None:
    (folder / "base.safetensors").write_bytes(BUILT)
    (folder / "config.json").write_bytes(b"{}" * 50)


def test_an_entry_of_the_cache_is_whole_or_absent(tmp_path: Path) -> None:
    source, disk = tmp_path / "source", tmp_path / "disk"
    source.write_bytes(b"weights")
    disk.mkdir()
    recorder = Recorder(disk)
    with recorder.recording():
        entry = entry_for(disk / "cache", [source], build)
        (entry / "config.json").write_bytes(b"")
        entry_for(disk / "cache", [source], build)
        recorder.acknowledge("built again")

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        place = left / entry.relative_to(disk)
        # By sizes alone, which is less than what the server looks at.
        assert not is_whole(place) or (place / "base.safetensors").read_bytes() == BUILT
        assert is_whole(place, digests=True) or "built again" not in acknowledged
        again = entry_for(left / "cache", [source], build)
        assert (again / "base.safetensors").read_bytes() == BUILT
        assert (again / "config.json").read_bytes() == b"{}" * 50

    replay(recorder.moments, check, at_most=2000)


def test_a_compiled_kernel_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = kernels.supported_isas()[-1]

    def compile_to(*, name: str, build_directory: str, **_: object) -> None:
        (Path(build_directory) / f"{name}.so").write_bytes(BUILT)

    monkeypatch.setattr(cpp_extension, "load", compile_to)
    monkeypatch.setenv("CXX", "true")
    recorder = Recorder(tmp_path)
    with recorder.recording():
        library = kernels.compile_kernels(isa, tmp_path)
        recorder.acknowledge("compiled")

    def check(left: Path, acknowledged: frozenset[str]) -> None:
        found = left / library.relative_to(tmp_path)
        if found.parent.exists():
            assert kernels.is_whole(found)
            assert found.read_bytes() == BUILT
        assert found.exists() or not acknowledged
        assert kernels.compile_kernels(isa, left).read_bytes() == BUILT

    replay(recorder.moments, check, at_most=2000)
