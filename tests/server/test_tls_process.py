"""An encrypted server as a process: probes with the command line, a new certificate, a drain."""

from __future__ import annotations

import signal
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from client.test_keys import VARIABLES
from cryptography import x509
from loraplex.cli import app
from rpc.certificates import Authority
from server.test_process import serving
from typer.testing import CliRunner


def shown(address: str, authority: Authority) -> int:
    """The serial number of the certificate that the server shows."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=authority.pem.decode())
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname="llm.example") as connection,
    ):
        return x509.load_der_x509_certificate(connection.getpeercert(True)).serial_number


def test_a_probe_with_the_command_line_works_and_a_new_certificate_needs_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"LORAPLEX_{name}", raising=False)
    ours, clients = Authority(tmp_path / "ours"), Authority(tmp_path / "clients")
    files, probe = ours.issue("server", "llm.example"), clients.issue("probe", "probe.example")
    settings = {"tls_certificate": files.chain, "tls_key": files.key, "tls_client_ca": clients.file}

    def health(address: str, **variables: Any) -> int:
        runner = CliRunner(env={name: str(value) for name, value in variables.items()})
        return runner.invoke(app, ["health", "--server", address]).exit_code

    with serving(tmp_path, **settings) as up:
        named = {"LORAPLEX_CA": ours.file, "LORAPLEX_SERVER_NAME": "llm.example"}
        own = {"LORAPLEX_CERTIFICATE": probe.chain, "LORAPLEX_PRIVATE_KEY": probe.key}
        assert health(up.grpc, **named, **own) == 0
        assert health(up.grpc, **named) == 4
        assert health(up.grpc, LORAPLEX_CA=ours.file, **own) == 4, "127.0.0.1 is not its name"
        assert health(up.grpc) == 4
        before = shown(up.grpc, ours)
        ours.issue("server", "llm.example")  # in place, one file after the other
        while shown(up.grpc, ours) == before:  # the test's own timeout bounds it
            time.sleep(0.1)
        assert health(up.grpc, **named, **own) == 0
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
    assert not any("Traceback" in line for line in up.log), "".join(up.log)
    assert sum("a new certificate is in use" in line for line in up.log) == 1
