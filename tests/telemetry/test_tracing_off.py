"""Without an endpoint nothing of OpenTelemetry is imported, and nothing of it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_server.app import Server
from loraplex_server.config import Config
from loraplex_server.exits import ServerExit
from loraplex_server.runtime.failures import StartFailure
from loraplex_server.telemetry.trace import NO_TRACING, open_tracing
from pydantic import ValidationError
from rpc.harness import ask, config_for, running

PROGRAM = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
"""


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM + program], check=True, timeout=120)


def test_the_server_is_imported_without_it() -> None:
    run("import loraplex_server.app, loraplex_server.cli, loraplex_server.engine.process.main")


def test_the_client_sends_its_metadata_without_it() -> None:
    run(
        "from loraplex.channel import CallDefaults\n"
        "given = CallDefaults(1.0, False, (('a', 'b'),)).arguments(None)\n"
        "assert given['metadata'] == (('a', 'b'),), given\n"
    )


async def test_calls_are_not_traced(tmp_path: Path) -> None:
    async with running(tmp_path) as up:
        assert up.server.metrics.tracing is NO_TRACING
        await up.generation.Generate(ask(new=1))


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "loraplex_server.telemetry.otlp", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)


async def test_an_endpoint_without_the_packages_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch)
    server = Server(config_for(tmp_path, otlp_endpoint="http://127.0.0.1:4317"))
    try:
        with pytest.raises(StartFailure) as failed:
            await server.start()
    finally:
        await server.close()
    assert failed.value.code is ServerExit.BAD_CONFIG
    assert "loraplex[otel]" in failed.value.message


def test_a_certificate_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "absent.pem"))
    with pytest.raises(StartFailure) as failed:
        open_tracing("https://127.0.0.1:4317", "1", lambda result, spans: None)
    assert failed.value.code is ServerExit.BAD_CONFIG
    assert "absent.pem" in failed.value.message


@pytest.mark.parametrize("text", ["localhost:4317", "ftp://a", "http://", "http:// a", "file:///a"])
def test_an_endpoint_is_a_url_of_http_or_https(text: str) -> None:
    with pytest.raises(ValidationError):
        Config(otlp_endpoint=text)
