"""A converted model is found again by content, survives crowds and crashes, and reports damage."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.base.weights import BaseWeights
from loraplex_model.checkpoints import cache, load

from model import tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path


class Builder:
    """Builds a two-file entry and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "weights").write_bytes(b"w" * 1000)
        (directory / "info.json").write_text("{}")


def test_a_second_look_builds_nothing(root: Path, source: Path) -> None:
    build = Builder()
    assert cache.entry_for(root, [source], build) == cache.entry_for(root, [source], build)
    assert build.calls == 1


def test_touching_and_moving_build_nothing(root: Path, source: Path, tmp_path: Path) -> None:
    build = Builder()
    entry = cache.entry_for(root, [source], build)
    os.utime(source, (1, 1))
    assert cache.entry_for(root, [source], build) == entry
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert cache.entry_for(root, [source.rename(moved / source.name)], build) == entry
    assert build.calls == 1


def test_changed_content_is_another_entry(root: Path, source: Path) -> None:
    build = Builder()
    entry = cache.entry_for(root, [source], build)
    source.write_bytes(b"other content")
    assert cache.entry_for(root, [source], build) != entry
    assert build.calls == 2


@pytest.mark.parametrize("damage", ["cut short", "file gone", "no record", "half a record"])
def test_a_damaged_entry_is_built_again(
    damage: str, root: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    entry = cache.entry_for(root, [source], build)
    match damage:
        case "cut short":
            (entry / "weights").write_bytes(b"w" * 999)
        case "file gone":
            (entry / "weights").unlink()
        case "no record":
            (entry / cache.ENTRY).unlink()
        case "half a record":
            (entry / cache.ENTRY).write_text('{"files": {"weights"')
    with caplog.at_level(logging.WARNING):
        assert cache.entry_for(root, [source], build) == entry
    assert build.calls == 2
    assert "damaged" in caplog.text
    assert cache.is_whole(entry, digests=True)


def test_a_flipped_bit_is_found_when_asked(root: Path, source: Path) -> None:
    build = Builder()
    entry = cache.entry_for(root, [source], build)
    (entry / "weights").write_bytes(b"v" + b"w" * 999)
    assert cache.is_whole(entry)
    assert not cache.is_whole(entry, digests=True)
    cache.entry_for(root, [source], build, verify=True)
    assert build.calls == 2
    assert cache.is_whole(entry, digests=True)


def test_a_failed_build_leaves_nothing(root: Path, source: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "weights").write_bytes(b"half")
        raise Refusal(Reason.MODEL_INVALID, "no tensor")

    with pytest.raises(Refusal):
        cache.entry_for(root, [source], fail)
    left = [path for path in (root / "entries").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_one_of_a_crowd_builds(root: Path, source: Path) -> None:
    build = Builder()
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda _: cache.entry_for(root, [source], build), range(16)))
    assert len(set(entries)) == 1
    assert build.calls == 1


def test_a_cache_that_cannot_be_written_is_a_typed_error(source: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Refusal, match="--cache") as caught:
        cache.entry_for(blocked, [source], Builder())
    assert caught.value.reason == "CACHE_FAILED"


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(root: Path) -> None:
    with pytest.raises(Refusal, match="gone") as caught:
        cache.entry_for(root, [root / "gone"], Builder())
    assert caught.value.reason == "MODEL_INVALID"


def tensors(weights: BaseWeights) -> list[torch.Tensor]:
    found = [weights.embed, weights.norm, weights.lm_head]
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            found += [matrix.packed, matrix.absmax, *matrix.absmax_scales]
        dense = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm, layer.qkv_bias)
        found += [tensor for tensor in dense if tensor is not None]
    return found


def test_a_cached_model_equals_a_converted_one(tmp_path: Path, root: Path) -> None:
    directory = tiny.write("qwen3", tmp_path / "model")
    fresh = load.load_base(str(directory), torch.float32, tmp_path / "other cache")
    load.load_base(str(directory), torch.float32, root)
    again = load.load_base(str(directory), torch.float32, root)
    assert again.weights.config == fresh.weights.config
    assert again.weights.fingerprint == fresh.weights.fingerprint
    assert [m.absmax_offsets for m in (again.weights.layers[1].qkv,)] == [
        m.absmax_offsets for m in (fresh.weights.layers[1].qkv,)
    ]
    for one, other in zip(tensors(fresh.weights), tensors(again.weights), strict=True):
        assert torch.equal(one, other)


def test_a_hit_imports_neither_transformers_nor_bitsandbytes(tmp_path: Path, root: Path) -> None:
    directory = tiny.write("llama", tmp_path / "model")
    load.load_base(str(directory), torch.float32, root)
    program = (
        "import sys, json, torch; from pathlib import Path\n"
        "from loraplex_model.checkpoints.load import load_base\n"
        "base = load_base(sys.argv[1], torch.bfloat16, Path(sys.argv[2]))\n"
        "print(json.dumps([base.weights.fingerprint, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory), str(root)],
        capture_output=True,
        text=True,
        check=True,
    )
    fingerprint, modules = json.loads(done.stdout)
    assert fingerprint.startswith("sha256:")
    assert not {"transformers", "bitsandbytes", "gguf", "huggingface_hub"} & set(modules)


def test_one_of_several_processes_builds(root: Path, source: Path, tmp_path: Path) -> None:
    """Each builder writes in two halves, so that an entry seen too early would be a damaged one."""
    log = tmp_path / "log"
    program = (
        "import sys, os; from pathlib import Path; from loraplex_model.checkpoints import cache\n"
        "root, source, log = map(Path, sys.argv[1:])\n"
        "def build(directory):\n"
        "    with log.open('a') as file: file.write('built\\n')\n"
        "    with (directory / 'weights').open('wb') as file:\n"
        "        file.write(b'w' * 500); file.flush(); os.sched_yield(); file.write(b'w' * 500)\n"
        "entry = cache.entry_for(root, [source], build)\n"
        "assert cache.is_whole(entry, digests=True)\n"
    )
    command = [sys.executable, "-c", program, str(root), str(source), str(log)]
    crowd = [subprocess.Popen(command) for _ in range(6)]
    assert [process.wait() for process in crowd] == [0] * 6
    assert log.read_text() == "built\n"


def test_what_a_killed_builder_left_is_swept(root: Path, source: Path) -> None:
    program = (
        "import sys, os, signal; from pathlib import Path\n"
        "from loraplex_model.checkpoints import cache\n"
        "def build(directory):\n"
        "    (directory / 'weights').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.entry_for(Path(sys.argv[1]), [Path(sys.argv[2])], build)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(root), str(source)])
    assert killed.returncode == -9
    entries = root / "entries"
    assert list(entries.glob(".building-*"))
    build = Builder()
    assert cache.is_whole(cache.entry_for(root, [source], build))
    assert not list(entries.glob(".building-*"))
