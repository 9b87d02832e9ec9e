"""What a service manager is told: that the server is ready, and that it stops and how long for."""

from __future__ import annotations

import signal
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from loraplex_server.runtime import service_manager
from server.test_process import serving


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + address[1:] if address.startswith("@") else address)
        listening.settimeout(30)
        yield listening


def test_a_server_reports_that_it_is_ready_and_that_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with manager(address) as listening:
        with serving(tmp_path, drain_timeout=2.5) as up:
            assert listening.recv(4096) == b"READY=1"
            up.process.send_signal(signal.SIGTERM)
            told = dict(line.split("=") for line in listening.recv(4096).decode().split("\n"))
            assert up.wait() == 0
        assert told == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "22500000"}
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.recv(4096)


def test_an_address_without_a_file_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"@loraplex-{uuid.uuid4().hex}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with manager(address) as listening:
        service_manager.ready()
        assert listening.recv(4096) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@", "x" * 4096])
def test_a_manager_that_is_not_there_does_not_disturb(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    service_manager.ready()
    service_manager.stopping(1.0)


def test_a_manager_that_does_not_read_does_not_hold_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with manager(address):
        while not caplog.records:  # until the socket keeps no more
            service_manager.ready()
    assert address in caplog.text
