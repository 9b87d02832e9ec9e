"""A disk that is really full: what the real programs do on a file system of a megabyte.

Needs the right to mount; other tests inject the same errors at single points.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from adapters.adapter_files import BASE
from loraplex import Client, ResourceExhausted
from loraplex.v1 import generation_pb2_grpc, training_pb2_grpc
from loraplex_adapters.store import Store
from loraplex_adapters.store.backup import check_backup
from loraplex_server.commands.program import app
from rpc.harness import ask, expected, write_adapter
from rpc.training_jobs import order, settings
from server.test_process import Process, outcome, serving, start, write_config
from typer.testing import CliRunner

from adapters import stores
from model import tiny


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    (tmp_path / "import").mkdir()
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Takes all room but `leave` bytes; the file that does so."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, os.fstat(file.fileno()).st_size - leave))
    return ballast


def generate(up: Process, adapter: str = "") -> list[int]:
    with grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        return list(stub.Generate(ask(adapter=adapter)).token_ids)


@pytest.mark.parametrize("leave", [0, 8192, 24576])
def test_a_full_store_refuses_registrations_and_serves_what_it_has(
    leave: int, disk: Path, tmp_path: Path
) -> None:
    sources = [write_adapter(tmp_path / f"source-{n}", n, rank=16) for n in range(2)]
    with serving(tmp_path, store=disk / "store") as up, Client(up.grpc) as client:
        digest = client.upload_adapter("a", sources[0]).adapter.digest
        ballast = fill(disk, leave=leave)

        def use_up() -> None:
            for number in range(50):
                client.upload_adapter(f"b{number}", sources[1])
                sources[1] = write_adapter(tmp_path / "next", number + 10, rank=16)

        with pytest.raises(ResourceExhausted) as caught:
            use_up()
        assert caught.value.reason == "STORE_FULL"
        assert generate(up) == expected([20, 21, 22], 8)
        assert generate(up, "a") == expected([20, 21, 22], 8, digest)
        ballast.unlink()
        client.upload_adapter("after", sources[1])
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
    with Store(disk / "store") as store:
        assert all(verified.error is None for verified in store.verify_all())
        assert store.resolve("after").version == 1


def test_a_server_does_not_start_on_a_full_store(disk: Path, tmp_path: Path) -> None:
    fill(disk)
    code, said = outcome(start(write_config(tmp_path, store=disk / "store")))
    assert (code, said[:7]) == (5, "error: ")
    assert "disk is full" in said


def test_a_full_disk_of_training_jobs_refuses_the_job_and_nothing_else(
    disk: Path, tmp_path: Path
) -> None:
    more = {**settings(tmp_path), "training_jobs_dir": disk / "jobs"}
    with serving(tmp_path, **more) as up, grpc.insecure_channel(up.grpc) as channel:
        ballast = fill(disk)
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateJob(order("step 1"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert generate(up) == expected([20, 21, 22], 8)
        ballast.unlink()
        assert stub.CreateJob(order("step 1")).job.job_id
        assert [path.name for path in (disk / "jobs").glob("*-*")] != []


def test_a_full_cache_is_named_with_what_to_do(disk: Path, tmp_path: Path) -> None:
    model = tiny.write("llama", tmp_path / "model")
    fill(disk, leave=8192)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loraplex_server.cli", "serve", "--model", str(model)),
            *("--device", "cpu", "--cache", str(disk / "cache"), "--port", "0"),
            *("--store", str(tmp_path / "store"), "--import-root", str(tmp_path / "import")),
            *("--admin-port", "0"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last[:7]) == (4, "error: "), done.stderr
    assert str(disk / "cache") in last
    assert "free some space" in last


def test_a_backup_on_a_full_disk_leaves_the_one_before_it(disk: Path, tmp_path: Path) -> None:
    root, place = tmp_path / "store", disk / "backup"
    sources = stores.adapters(tmp_path, 2)
    command = ["store", "backup", str(place), "--store", str(root), "--no-training"]
    with Store(root) as store:
        store.register("a", sources[0], BASE)
    assert CliRunner().invoke(app, command).exit_code == 0
    with Store(root) as store:
        store.register("b", sources[1], BASE)
    ballast = fill(disk)
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: DISK_FULL: ")
    checked = check_backup(place)
    assert (len(checked.manifest.blobs), checked.damaged) == (1, {})
    ballast.unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(check_backup(place).manifest.blobs) == 2


def test_a_recovery_on_a_full_disk_goes_on_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    root, place, new = tmp_path / "store", tmp_path / "backup", disk / "new"
    with Store(root) as store:
        for number, source in enumerate(stores.adapters(tmp_path, 3)):
            store.register(f"a{number}", source, BASE)
    runner = CliRunner()
    command = ["store", "backup", str(place), "--store", str(root), "--no-training"]
    assert runner.invoke(app, command).exit_code == 0
    ballast = fill(disk, leave=40960)
    command = ["store", "recover", str(place), "--store", str(new)]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 5
    assert refused.stderr.startswith("error: STORE_FULL: ")
    assert runner.invoke(app, ["store", "ls", "--store", str(new)]).exit_code == 5
    ballast.unlink()
    assert runner.invoke(app, command).exit_code == 0
    with Store(new) as store:
        assert [verified.error for verified in store.verify_all()] == [None] * 3
