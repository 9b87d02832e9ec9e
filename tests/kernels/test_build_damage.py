"""A damaged build of the kernels is noticed, reported and built again."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loraplex_model.ops import build
from torch.utils import cpp_extension

pytestmark = pytest.mark.fault("kernel-cache-damaged")

ISA = build.supported_isas()[-1]


class Compiler:
    """Stands for torch's extension loader: "compiles" by copying a library; counts its runs."""

    def __init__(self, library: Path) -> None:
        self.runs = 0
        self._library = library

    def __call__(self, *, name: str, build_directory: str, **_: object) -> None:
        self.runs += 1
        shutil.copyfile(self._library, Path(build_directory) / f"{name}.so")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that loads; this process has not loaded it."""
    copy = tmp_path_factory.mktemp("good") / "good.so"
    return Path(shutil.copyfile(build.compile_kernels(ISA), copy))


@pytest.fixture
def compiler(library: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler(library)
    monkeypatch.setattr(cpp_extension, "load", compiler)
    monkeypatch.setattr(build, "_loaded", {})  # as in a new process
    monkeypatch.delenv("LORAPLEX_KERNELS_DIR", raising=False)
    return compiler


def load(directory: Path, monkeypatch: pytest.MonkeyPatch) -> build.Kernels:
    monkeypatch.setattr(build, "_loaded", {})
    return build.load(ISA, (), directory)


def pretend_it_is_whole(path: Path) -> None:
    """Writes the digest of what is there."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / build.DIGEST).write_text(digest)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def not_loadable(path: Path) -> None:
    path.write_bytes(b"no ELF file")
    pretend_it_is_whole(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, 5000),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "flipped": flip,
    "gone": lambda path: path.unlink(),
    "no digest": lambda path: (path.parent / build.DIGEST).unlink(),
    "half a digest": lambda path: (path.parent / build.DIGEST).write_text("0123"),
    "digest of another": lambda path: (path.parent / build.DIGEST).write_text("0" * 64),
    "whole but not loadable": not_loadable,
    "a file in its place": lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_build_is_built_again_once_with_a_warning(
    damage: str,
    compiler: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = build.compile_kernels(ISA, tmp_path)
    DAMAGES[damage](path)
    kernels = load(tmp_path, monkeypatch)
    assert kernels.loraplex_lanes() > 0
    assert kernels._name == str(path)
    assert compiler.runs == 2
    assert [r.levelno for r in caplog.records if str(path) in r.message] == [logging.WARNING]
    caplog.clear()
    assert load(tmp_path, monkeypatch).loraplex_lanes() > 0
    assert compiler.runs == 2
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert build.find(ISA, (), tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        path.parent.name
    ]


@pytest.mark.parametrize("damage", ["cut short", "flipped", "whole but not loadable"])
def test_behind_a_damaged_shipped_build_the_cache_is_used(
    damage: str,
    compiler: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    damaged = build.compile_kernels(ISA, shipped)
    whole = build.compile_kernels(ISA, cache)
    DAMAGES[damage](damaged)
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(shipped))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(cache, monkeypatch)._name == str(whole)
    assert str(damaged) in caplog.text
    assert compiler.runs == 2


@pytest.mark.parametrize("damage", ["cut short", "whole but not loadable"])
def test_without_a_compiler_the_warnings_say_what_is_damaged_and_what_to_do(
    damage: str,
    compiler: Compiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = build.compile_kernels(ISA, tmp_path)
    DAMAGES[damage](path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.KernelsUnavailable, match=r"install g\+\+"):
        load(tmp_path, monkeypatch)
    assert str(path) in caplog.text
    assert path.exists(), "what cannot be replaced stays"


def test_a_compiler_whose_libraries_never_load_is_asked_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.compile_kernels(ISA, tmp_path)
    not_loadable(path)
    compiler._library = tmp_path / "broken.so"
    compiler._library.write_bytes(b"no ELF file either")
    with pytest.raises(build.KernelsUnavailable, match="do not load"):
        load(tmp_path, monkeypatch)
    assert compiler.runs == 2


def test_several_at_once_compile_once(compiler: Compiler, tmp_path: Path) -> None:
    path = build.compile_kernels(ISA, tmp_path)
    flip(path)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: build.compile_kernels(ISA, tmp_path), range(12)))
    assert set(found) == {path}
    assert compiler.runs == 2


def test_a_directory_that_cannot_be_written_is_no_crash(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(build.KernelsUnavailable, match="Not a directory"):
        load(tmp_path / "file" / "kernels", monkeypatch)


def test_a_build_is_on_the_disk_before_it_has_its_name(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Library, digest and folder are flushed before the rename, the folder above after it."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor: int) -> None:
        events.append("flush " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def move(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", move)
    build.compile_kernels(ISA, tmp_path)
    assert events[0] == f"flush {tmp_path.parent.name}"  # the name of the cache's folder
    assert events[1] == f"flush {build.LIBRARY}"
    assert events[2].startswith("flush .writing-")  # the digest
    assert events[3:] == ["flush finished", "rename finished", f"flush {tmp_path.name}"]


def test_what_a_killed_compiler_left_is_swept(compiler: Compiler, tmp_path: Path) -> None:
    name = build.compile_kernels(ISA, tmp_path).parent.name
    shutil.rmtree(tmp_path / name)
    (tmp_path / f".build-{name}-x" / "half").mkdir(parents=True)
    build.compile_kernels(ISA, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [name]
