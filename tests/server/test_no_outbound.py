"""A server opens no connection to another machine: neither it, nor its engines and trainers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from loraplex import Client, JobState
from loraplex.v1 import generation_pb2_grpc
from rpc.harness import ask
from server.test_process import Process, children, serving, toml
from train import runs

from server import outbound

TESTS = Path(__file__).resolve().parents[1]
KERNELS = TESTS.parent / "var" / "cache" / "kernels"

REACH_OUT = """
import socket, subprocess, sys
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    with socket.socket(socket.AF_INET, kind) as made:
        try:
            made.connect(("192.0.2.1", 9))
        except OSError:
            pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
    try:
        made.sendto(b"x", ("192.0.2.2", 9))
    except OSError:
        pass
try:
    socket.create_connection(("example.invalid", 443), 1)
except OSError:
    pass
with socket.socket() as listening, socket.socket() as made:
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    made.connect(listening.getsockname())
    socket.getaddrinfo("localhost", 80)
if len(sys.argv) < 2:
    import grpc
    try:
        grpc.channel_ready_future(grpc.insecure_channel("192.0.2.3:9")).result(3)
    except grpc.FutureTimeoutError:
        pass
    subprocess.run([sys.executable, __file__, "child"])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = outbound.compiled(tmp_path_factory.mktemp("outbound"))
    if found is None:
        pytest.skip("needs a C compiler and Linux")
    return found


def test_an_attempt_is_noticed_in_a_process_its_children_and_grpc(
    library: Path, tmp_path: Path
) -> None:
    script, report = tmp_path / "reach.py", tmp_path / "report"
    script.write_text(REACH_OUT)
    variables = {**os.environ, **outbound.environment(library, report)}
    subprocess.run([sys.executable, str(script)], env=variables, check=True)
    found = [line.partition(" by ")[0] for line in outbound.attempts(report)]
    own = ["connect 192.0.2.1", "connect 192.0.2.1", "sendto 192.0.2.2"]
    own.append("getaddrinfo example.invalid")
    assert found[:4] == own
    assert found[-4:] == own
    assert {line.removeprefix("connect ::ffff:") for line in found[4:-4]} == {"192.0.2.3"}


def test_an_attempt_of_this_process_is_noticed() -> None:
    with outbound.watched() as found:
        for address in (("192.0.2.1", 9), ("example.invalid", 443)):
            with pytest.raises(PermissionError):
                socket.create_connection(address, 1)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            socket.create_connection(listening.getsockname(), 1).close()
    assert [line.split()[-1] for line in found] == ["192.0.2.1", "example.invalid"]


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_server_with_a_real_base_reaches_nobody(
    trains: bool, library: Path, tmp_path: Path
) -> None:
    report, model = tmp_path / "report", runs.write_base(tmp_path)
    (tmp_path / "import").mkdir()
    fields = {
        "model": str(model), "dtype": "float32", "device": "cpu", "threads": 1,
        "store": str(tmp_path / "store"), "cache": str(tmp_path / "cache"),
        "import_root": str(tmp_path / "import"), "port": 0, "admin_port": 0, "kv_tokens": 1024,
        "training": trains, "training_jobs_dir": str(tmp_path / "jobs"), "training_threads": 1,
    }  # fmt: skip
    file = tmp_path / "server.toml"
    file.write_text("\n".join(f"{name} = {toml(value)}" for name, value in fields.items()))
    variables = {**os.environ, **outbound.environment(library, report), "OMP_NUM_THREADS": "1"}
    if KERNELS.is_dir():
        variables["LORAPLEX_KERNELS_DIR"] = str(KERNELS)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        variables.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables,
    )  # fmt: skip
    try:
        up = Process(process)
        with Client(up.grpc, timeout=120.0) as client:
            client.generate("abc>", max_new_tokens=4)
            if trains:
                job = client.training.create(
                    "tickets", runs.write_data(tmp_path / "data.jsonl"), options={"r": 2},
                    steps=2, batch_size=2, max_length=64, load=True,
                )  # fmt: skip
                *_, done = client.training.watch(job.job_id)
                assert done.state is JobState.SUCCEEDED, done.error
                client.generate("abc>", adapter="tickets", max_new_tokens=4)
        process.terminate()
        assert up.wait() == 0
    finally:
        process.kill()
        process.wait()
    assert outbound.attempts(report) == []


def test_the_hub_is_asked_at_the_first_start_only(tmp_path: Path) -> None:
    """A restarted engine, and a trainer, take what the first start has fetched."""
    with serving(tmp_path) as up, grpc.insecure_channel(up.grpc) as channel:
        (engine,) = children(up.process.pid)
        assert "HF_HUB_OFFLINE=1" not in variables_of(engine)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        os.kill(engine, 9)
        answered = False
        while not answered:  # a child that is there has perhaps not begun the engine's program
            with contextlib.suppress(grpc.RpcError):
                stub.Generate(ask())
                answered = children(up.process.pid) != [engine]
        (engine,) = children(up.process.pid)
        assert "HF_HUB_OFFLINE=1" in variables_of(engine)


def variables_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
