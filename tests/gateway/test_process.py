"""The gateway as a process: by itself, and beside the server that starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client.fake_server import FakeServer
from loraplex.v1 import model_pb2
from server.test_process import children, is_alive, outcome, start, write_config

SLOW = {"step_seconds": 0.02, "num_blocks": 1024, "max_context": 4096}


def alone(*flags: str, **environment: str) -> subprocess.Popen[str]:
    """The gateway's own command."""
    return subprocess.Popen(
        [sys.executable, "-m", "loraplex_gateway", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def ready(process: subprocess.Popen[str]) -> str:
    """The URL in the line that says that a process is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"\bhttp (\S+)", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return f"http://{found[1]}"


def ask(url: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def asked(tokens: int, **more: Any) -> dict[str, Any]:
    talk = [{"role": "user", "content": "canary-in-the-prompt"}]
    return {"model": "oracle", "messages": talk, "max_tokens": tokens, "temperature": 0, **more}


@contextmanager
def beside(folder: Path, **settings: Any) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server with a gateway: its process, the gateway's URL, and its log."""
    file = write_config(folder, gateway="127.0.0.1:0", **settings)
    process = start(file)
    log: list[str] = []
    assert process.stderr is not None
    errors = process.stderr
    try:
        url = ready(process)
        reader = threading.Thread(target=lambda: log.extend(errors))
        reader.start()
        yield process, url, log
    finally:
        process.kill()
        process.wait()


def gateway_of(pid: int) -> int:
    """The pid of the gateway that a server has started."""
    (found,) = [
        child
        for child in children(pid)
        if b"loraplex_gateway" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return found


def until(holds: Any) -> None:
    """Waits for what must come about; the test's own timeout bounds it."""
    while not holds():
        time.sleep(0.02)


def test_by_itself_it_serves_and_ends_well_on_sigterm() -> None:
    server = FakeServer(model=model_pb2.Model(name="fake", max_context=64))
    server.start()
    process = alone("--port", "0", "--target", server.target)
    try:
        url = ready(process)
        status, body = ask(url, "/v1/chat/completions", {**asked(3), "model": "fake"})
        assert (status, json.loads(body)["choices"][0]["index"]) == (200, 0)
        assert ask(url, "/health")[0] == 200
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert (out, errors) == ("", "")
    finally:
        process.kill()
        server.stop()


def test_a_signal_lets_running_streams_finish_and_takes_no_new_connection(tmp_path: Path) -> None:
    with beside(tmp_path, engine_options=SLOW) as (_, first, _):
        target = _socket_of(first)
        process = alone("--port", "0", "--target", target)
        try:
            url = ready(process)
            request = urllib.request.Request(
                url + "/v1/chat/completions",
                json.dumps(asked(100, stream=True)).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as stream:
                stream.readline()
                process.send_signal(signal.SIGTERM)
                place = url.removeprefix("http://").split(":")
                until(lambda: _refuses(place[0], int(place[1])))
                rest = stream.read()
            assert rest.endswith(b"data: [DONE]\n\n")
            assert b'"finish_reason":"length"' in rest
            assert process.wait(30) == 0
        finally:
            process.kill()


def _socket_of(url: str) -> str:
    """The target of the gateway that listens at a URL, which other gateways can use, too."""
    port = url.rpartition(":")[2].encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"loraplex_gateway" in words and b"--target" in words and _listens(folder, int(port)):
            return words[words.index(b"--target") + 1].decode()
    raise AssertionError("there is no gateway")


def _listens(folder: Path, port: int) -> bool:
    lines = (folder / "net/tcp").read_text().splitlines()[1:]
    inodes = {line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}")}
    try:
        links = [os.readlink(link) for link in (folder / "fd").iterdir()]
    except OSError:
        return False
    return any(f"socket:[{inode}]" in links for inode in inodes)


def _refuses(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--port", "99999"), 2, "port"),
        (("--host", "0.0.0.0"), 2, "insecure"),
        (("--host", "no.such.host.invalid", "--insecure"), 3, "no.such.host.invalid"),
        (("--certificate", "nowhere.pem"), 2, "private_key"),
        (("--certificate", "/nowhere.pem", "--private-key", "/nowhere.pem"), 2, "certificate"),
        (("--ca", "/nowhere.pem"), 2, "nowhere.pem"),
        (("--target", "http://x"), 2, "target"),
        (("--metrics", "file:///etc/passwd"), 2, "metrics"),
        (("--max-body-bytes", "0"), 2, "max_body_bytes"),
        (("--drain-seconds", "-1"), 2, "drain_seconds"),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_what_keeps_it_from_starting_is_one_line_and_a_code(
    flags: tuple[str, ...], code: int, said: str
) -> None:
    process = alone("--port", "0", *flags) if "--port" not in flags else alone(*flags)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert out == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_port_in_use_is_told_by_the_gateway_and_by_the_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = alone("--port", str(port))
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3
        assert errors.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
        assert len(errors.splitlines()) == 1
        code, said = outcome(start(write_config(tmp_path, gateway=f"127.0.0.1:{port}")))
    assert code == 3
    assert said.startswith("error: the gateway does not start: cannot listen on")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gateway": "8000"}, "HOST:PORT"),
        ({"gateway": "0.0.0.0:0"}, "--insecure"),
        ({"gateway": "127.0.0.1:99999"}, "HOST:PORT"),
    ],
)
def test_a_wrong_address_is_told(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    file = write_config(tmp_path)
    code, line = outcome(start(file, "--gateway", settings["gateway"]))
    assert code == 2
    assert said in line


def test_a_missing_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = alone("--port", "0", PYTHONPATH=path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors == "error: the gateway needs the package uvicorn: install loraplex[gateway]\n"


def test_beside_the_server_it_serves_and_they_end_together(tmp_path: Path) -> None:
    with beside(tmp_path) as (process, url, log):
        pid = gateway_of(process.pid)
        status, body = ask(url, "/v1/chat/completions", asked(5))
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 5
        status, body = ask(url, "/metrics")
        assert b"loraplex_generated_tokens_total 5.0" in body
        assert b'route="/v1/chat/completions",status="200"} 1.0' in body
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not is_alive(pid)
    text = "".join(log)
    assert "canary" not in text
    assert "gateway ended" not in text
    assert "Traceback" not in text


def test_a_gateway_that_dies_is_started_again_at_the_same_port(tmp_path: Path) -> None:
    with beside(tmp_path) as (process, url, log):
        for _ in range(2):
            pid = gateway_of(process.pid)
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: not is_alive(pid))
            until(lambda: _answers(url))
            assert gateway_of(process.pid) != pid
        assert ask(url, "/v1/chat/completions", asked(2))[0] == 200
        assert sum("the gateway ended (-9)" in line for line in log) == 2
        assert process.poll() is None


def _answers(url: str) -> bool:
    try:
        return ask(url, "/health")[0] == 200
    except OSError:
        return False


def test_a_killed_server_takes_its_gateway_with_it(tmp_path: Path) -> None:
    with beside(tmp_path) as (process, _, _):
        pid = gateway_of(process.pid)
        process.kill()
        process.wait()
        until(lambda: not is_alive(pid))


def test_the_log_has_no_prompt_and_no_key(tmp_path: Path) -> None:
    with beside(tmp_path, log_level="debug") as (process, url, log):
        for body in (
            asked(2),
            asked(2, temperature=-1, stop=["canary-stop"]),
            asked(2, user="canary-user", tools=[{"canary": 1}]),
            {"model": "canary/model", "messages": [{"role": "canary"}]},
        ):
            ask(url, "/v1/chat/completions", body)
        host, _, port = url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"canary GARBAGE\r\n\r\n")
            raw.recv(4096)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert log
    assert not [line for line in log if "canary" in line]
