"""The server as a process: its messages, its exit codes, its signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import generation_pb2_grpc
from rpc.harness import ask, config_for, expected, refusal, series, streamed

TESTS = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def write_config(folder: Path, **settings: Any) -> Path:
    """A settings file for a server over the oracle."""
    config = config_for(folder, **settings)
    fields = config.model_dump(mode="json", exclude={"engine_options"})
    fields["engine_options"] = config.engine_options
    file = folder / "server.toml"
    file.write_text(
        "\n".join(f"{name} = {toml(value)}" for name, value in fields.items() if value is not None)
    )
    return file


def start(file: Path, *flags: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(file), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


class Process:
    """A serving process and where to find it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"ready: grpc (\S+) admin (\S+) model .+ in [\d.]+ s\n", line)
        if found is None:
            raise AssertionError(line + process.communicate()[1])
        self.grpc, self.admin = found.groups()
        self.log: list[str] = []
        self._reader = threading.Thread(target=lambda: self.log.extend(process.stderr))
        self._reader.start()

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join()
        return code


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Process]:
    process = start(write_config(folder, **settings))
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


SLOW = {"step_seconds": 0.01, "num_blocks": 1024}


def test_sigterm_lets_running_streams_finish_and_takes_no_new_work(tmp_path: Path) -> None:
    with serving(tmp_path, engine_options=SLOW) as up, grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(streamed(ask(new=150)))
        next(stream)
        engine = children(up.process.pid)
        up.process.send_signal(signal.SIGTERM)
        health = health_pb2_grpc.HealthStub(channel)
        serving_now = health_pb2.HealthCheckResponse.SERVING
        while health.Check(health_pb2.HealthCheckRequest()).status == serving_now:
            pass
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(ask())
        assert refusal(caught.value).reason == "DRAINING"
        assert refusal(caught.value).code is grpc.StatusCode.UNAVAILABLE
        tokens = [token for event in stream for token in event.delta.token_ids]
        assert tokens == expected([20, 21, 22], 150)
        assert up.wait() == 0
        assert not any(is_alive(pid) for pid in engine)
        assert not any("Traceback" in line for line in up.log), "".join(up.log)


def test_what_outlasts_the_drain_is_told_so(tmp_path: Path) -> None:
    with (
        serving(tmp_path, engine_options=SLOW, drain_timeout=0.2) as up,
        grpc.insecure_channel(up.grpc) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(streamed(ask(new=1000)))
        next(stream)
        up.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert refusal(caught.value).reason == "DRAINING"
        assert up.wait() == 0


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with (
        serving(tmp_path, engine_options=SLOW, drain_timeout=3600) as up,
        grpc.insecure_channel(up.grpc) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(streamed(ask(new=1000)))
        next(stream)
        engine = children(up.process.pid)
        up.process.send_signal(signal.SIGTERM)
        while not any("draining" in line for line in up.log):
            pass
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 128 + signal.SIGTERM
        while any(is_alive(pid) for pid in engine):
            pass


@pytest.mark.slow
def test_a_hung_engine_does_not_outlive_its_server(tmp_path: Path) -> None:
    with (
        serving(tmp_path, engine_options=SLOW, drain_timeout=0.2) as up,
        grpc.insecure_channel(up.grpc) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(streamed(ask(new=1000)))
        next(stream)
        engine = children(up.process.pid)
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        up.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert refusal(caught.value).reason in {"DRAINING", "ENGINE_RESTARTED"}
        assert up.process.wait(20.2) == 0
        assert not any(is_alive(pid) for pid in engine)


@pytest.mark.fault("admin-threads")
def test_half_sent_requests_to_the_admin_port_cost_no_threads(tmp_path: Path) -> None:
    with serving(tmp_path) as up, ExitStack() as stack:
        threads = Path(f"/proc/{up.process.pid}/task")
        before = len(list(threads.iterdir()))
        host, _, port = up.admin.rpartition(":")
        for _ in range(400):
            held = stack.enter_context(socket.create_connection((host, int(port))))
            held.sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        with urlopen(f"http://{up.admin}/metrics", timeout=30) as reply:
            assert b"loraplex_engine_ready 1.0" in reply.read()
        assert len(list(threads.iterdir())) - before < 40


def test_no_engine_outlives_a_killed_front(tmp_path: Path) -> None:
    with serving(tmp_path) as up:
        engine = children(up.process.pid)
        assert engine
        up.process.kill()
        up.wait()
        while any(is_alive(pid) for pid in engine):
            pass


def test_metrics_are_served_on_the_admin_port(tmp_path: Path) -> None:
    with serving(tmp_path) as up, grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stub.Generate(ask(new=5))
        with urlopen(f"http://{up.admin}/metrics") as reply:
            seen = series(reply.read().decode())
        ended = "loraplex_requests_total[('code', 'OK'), ('method', 'Generate')]"
        assert seen[ended] == 1
        assert seen["loraplex_generated_tokens_total[]"] == 5
        assert seen["loraplex_prompt_tokens_total[]"] == 3
        assert seen["loraplex_time_to_first_token_seconds_count[]"] == 1
        # The unary call may be given everything at once, so there may be nothing between tokens.
        assert "loraplex_inter_token_latency_seconds_count[]" in seen
        assert seen["loraplex_queue_depth[]"] == 0
        assert seen["loraplex_engine_ready[]"] == 1
        assert any(name.startswith("loraplex_model_info") for name in seen)
        assert any(name.startswith("process_resident_memory_bytes") for name in seen)


def test_json_logs_are_json_carry_the_request_id_and_no_prompt(tmp_path: Path) -> None:
    with (
        serving(tmp_path, log_format="json") as up,
        grpc.insecure_channel(up.grpc) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = ask(new=2, request_id="find-me")
        request.prompt = "canary-in-the-prompt"
        stub.Generate(request)
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
        lines = [json.loads(line) for line in up.log if line.startswith("{")]
        (ended,) = [line for line in lines if line.get("request_id") == "find-me"]
        assert ended["method"] == "Generate"
        assert ended["code"] == "OK"
        assert not any("canary" in line for line in up.log)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and the last line that it said."""
    _, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode, errors.strip().splitlines()[-1]


@pytest.mark.parametrize("which", ["port", "admin_port"])
def test_a_port_in_use_is_told(tmp_path: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = outcome(start(write_config(tmp_path, **{which: port})))
    assert code == 3
    assert f"127.0.0.1:{port}" in said
    assert said.startswith("error: cannot listen on")


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    settings = write_config(tmp_path, engine_options={"refuse": "MODEL_NOT_FOUND"})
    process = start(settings)
    _, errors = process.communicate()
    assert process.returncode == 4
    (told,) = [line for line in errors.splitlines() if "this model cannot be served" in line]
    assert told == "error: this model cannot be served"
    assert "Traceback" not in errors, errors


def test_wrong_settings_are_told(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    assert outcome(start(file, "--port", "x"))[0] == 2
    code, said = outcome(start(file, "--host", "0.0.0.0"))
    assert code == 2
    assert "--insecure" in said
    code, said = outcome(start(tmp_path / "nowhere.toml"))
    assert code == 2
    assert "nowhere.toml" in said


def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    code, said = outcome(start(write_config(tmp_path, store=tmp_path / "file")))
    assert code == 5
    assert said.startswith("error: ")
    code, said = outcome(start(write_config(tmp_path, store=tmp_path / "file" / "below")))
    assert code == 5


def test_sigterm_while_the_model_loads_ends_it_well(tmp_path: Path) -> None:
    settings = {"engine_factory": "rpc.slow_start:build", "engine_options": {}}
    process = start(write_config(tmp_path, **settings))
    assert process.stderr is not None
    for line in process.stderr:
        if "building" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0


def test_the_front_process_never_imports_torch() -> None:
    program = (
        "import sys, loraplex_server.app, loraplex_server.commands.program;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_version_and_doctor_run(tmp_path: Path) -> None:
    cli = [sys.executable, "-m", "loraplex_server.cli"]
    said = subprocess.run([*cli, "version"], capture_output=True, text=True, check=True)
    assert re.match(r"loraplex-server \d+\.\d+\.\d+", said.stdout)
    file = write_config(tmp_path)
    checked = subprocess.run(
        [*cli, "doctor", "--config", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for subject in ("processor", "instructions", "compiler", "kernels", "model", "store"):
        assert re.search(rf"^ok +{subject}", checked.stdout, re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        checked = subprocess.run(
            [*cli, "doctor", "--config", str(file), "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )
    assert checked.returncode == 1
    assert re.search(rf"^!! +grpc port +127\.0\.0\.1:{port}", checked.stdout, re.MULTILINE)
