"""The cached base is cut short or written to while an engine has it mapped; R17."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.test_local_runner import PROMPT, registered, start
from engine.test_process import ask, drain, engine
from loraplex_model.checkpoints import stored
from loraplex_model.ops import build
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.engine.runner.config import RunnerConfig
from loraplex_server.engine.runner.local import EXIT_BASE_CHANGED, LocalRunner

from model import tiny


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of the checkout, for engines with caches of their own."""
    directory = Path("var/cache/kernels").absolute()
    build.compile_kernels(build.supported_isas()[0], directory)
    monkeypatch.setenv("LORAPLEX_KERNELS_DIR", str(directory))


def cut_away(file: Path) -> None:
    os.truncate(file, 0)


def cut_in_the_last_page(file: Path) -> None:
    """Leaves zeros instead of SIGBUS."""
    os.truncate(file, file.stat().st_size - 100)


def write_a_byte(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(b"\x5a")


def leave(file: Path) -> None:
    """What another process does that builds the entry again."""
    file.rename(file.with_name(".elsewhere"))


DAMAGES = (cut_away, cut_in_the_last_page, write_a_byte)


def lives(checkpoint: Path, folder: Path, results: multiprocessing.SimpleQueue) -> None:
    """Builds runners in this process and tries every use and damage in a fork of it."""
    logging.disable()
    native = start(checkpoint, folder / "cache")
    build._loaded.clear()
    os.environ["CXX"] = "no-such-compiler"
    del os.environ["LORAPLEX_KERNELS_DIR"]
    torch_runner = start(checkpoint, folder / "cache")
    assert torch_runner.info.kernels == "torch"
    ref = registered(native, folder)
    adapter = native.read_adapter(ref)
    uses: dict[str, tuple[LocalRunner, Callable[[LocalRunner], object]]] = {
        "merge": (native, lambda runner: runner.merge_adapter(adapter)),
        "read": (native, lambda runner: runner.read_adapter(ref)),
        "torch pass": (torch_runner, lambda runner: runner.forward(PROMPT)),
        "native pass": (native, lambda runner: runner.forward(PROMPT)),
    }
    (file,) = (folder / "cache").glob(f"entries/*/{stored.WEIGHTS}")
    content, times = file.read_bytes(), file.stat()
    for use, (runner, act) in uses.items():
        for damage in (*DAMAGES, leave):
            pid = os.fork()
            if not pid:
                damage(file)
                act(runner)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if damage is leave:
                file.with_name(".elsewhere").rename(file)
            with file.open("r+b") as opened:
                opened.write(content)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            results.put((use, damage.__name__, status))
    results.put(None)


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.fault("base-cache-cut-short")
@pytest.mark.parametrize("damage", [cut_in_the_last_page, write_a_byte])
def test_nothing_is_computed_from_a_file_that_is_not_the_base(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []

    def end(status: int) -> None:
        ends.append(status)
        raise Ended

    runner = start(tiny.write("llama", tmp_path / "model"), tmp_path / "cache")
    ref = registered(runner, tmp_path)
    adapter = runner.read_adapter(ref)
    (file,) = (tmp_path / "cache").glob(f"entries/*/{stored.WEIGHTS}")
    damage(file)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    uses = (
        lambda: runner.merge_adapter(adapter),
        lambda: runner.read_adapter(ref),
        lambda: runner.forward(PROMPT),
    )
    for use in uses:
        with pytest.raises(Ended):
            use()
    assert ends == [EXIT_BASE_CHANGED] * 3


@pytest.mark.slow
@pytest.mark.fault("base-cache-cut-short")
def test_an_engine_ends_cleanly_before_it_reads_what_is_not_the_base(tmp_path: Path) -> None:
    """Neither by SIGBUS nor with zeros for weights."""
    checkpoint = tiny.write("llama", tmp_path / "model")
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    process = spawn.Process(target=lives, args=(checkpoint, tmp_path, results))
    process.start()
    found: dict[tuple[str, str], int] = {}
    while process.is_alive() or not results.empty():
        process.join(0.1)
        while not results.empty() and (item := results.get()) is not None:
            use, damage, status = item
            found[use, damage] = status
    assert process.exitcode == 0
    assert len(found) == 4 * 4
    for (use, damage), status in found.items():
        assert status == (0 if damage == "leave" else EXIT_BASE_CHANGED), (use, damage)


@pytest.mark.slow
@pytest.mark.fault("base-cache-cut-short")
async def test_the_next_engine_has_the_base_built_again(tmp_path: Path) -> None:
    checkpoint, cache = tiny.write("llama", tmp_path / "model"), tmp_path / "cache"
    runner = start(checkpoint, cache)
    ref = registered(runner, tmp_path)
    config = RunnerConfig(
        model=str(checkpoint),
        dtype="float32",
        device="cpu",
        threads=1,
        cache=str(cache),
        max_context=0,
        kv_tokens=512,
        kv_memory=0,
        adapter_memory=1 << 20,
        merge_memory=1 << 24,
        max_rank=16,
    )
    (file,) = cache.glob(f"entries/*/{stored.WEIGHTS}")
    content = file.read_bytes()
    async with engine(EngineSetup(config).command()) as (client, observer):
        before = await drain(client.submit(ask(1, [1, 5, 9, 4], 8, adapters=[ref])))
        os.truncate(file, 5000)
        with pytest.raises(Exception, match="engine"):
            await client.merge(ref)
        await observer.until(lambda: observer.readies == 2)
        after = await drain(client.submit(ask(2, [1, 5, 9, 4], 8, adapters=[ref])))
        await client.merge(ref)
    assert after == before
    assert file.read_bytes() == content
