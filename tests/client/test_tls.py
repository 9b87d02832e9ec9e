"""Encrypted connections of the clients: real handshakes, whom they trust, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from client.fake_server import FakeServer
from client.test_keys import BEARER, KEY, VARIABLES
from loraplex import AsyncClient, Client, InvalidRequest, Unavailable
from loraplex.cli import app
from rpc.certificates import Authority, Pair, server_credentials
from typer.testing import CliRunner

Serve = Callable[..., FakeServer]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"LORAPLEX_{name}", raising=False)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "others")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers with a certificate each."""
    started: list[FakeServer] = []

    def start(pair: Pair, client_ca: Path | None = None) -> FakeServer:
        started.append(FakeServer())
        started[-1].start(server_credentials(pair, client_ca))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def says(server: FakeServer, **options: Any) -> str:
    """What the server answers, as a text; the name of the error if there is no answer."""
    try:
        with Client(server.target, timeout=20.0, **options) as client:
            return client.generate("x").text
    except (Unavailable, InvalidRequest) as error:
        return type(error).__name__


def test_only_a_server_of_the_given_authority_with_the_right_name_is_accepted(
    serve: Serve, ours: Authority, others: Authority
) -> None:
    right = serve(ours.issue("right"))
    assert says(right, ca=ours.file) == "base says x"
    assert says(right, ca=str(ours.file), tls=True) == "base says x"
    assert says(right, ca=others.file) == "Unavailable"
    assert says(right, tls=True) == "Unavailable", "the system knows no such authority"
    assert says(right) == "Unavailable", "an unencrypted client reaches no encrypted server"
    foreign = serve(others.issue("foreign"))
    assert says(foreign, ca=ours.file) == "Unavailable"
    assert foreign.calls == []
    misnamed = serve(ours.issue("misnamed", "example.com"))
    assert says(misnamed, ca=ours.file) == "Unavailable"
    assert says(misnamed, ca=ours.file, server_name="example.com") == "base says x"
    assert says(misnamed, ca=ours.file, server_name="example.org") == "Unavailable"
    expired = serve(ours.issue("expired", days=-1))
    assert says(expired, ca=ours.file) == "Unavailable"
    future = serve(ours.issue("future", days=90))
    assert says(future, ca=ours.file) == "Unavailable"
    assert misnamed.methods() == ["Generate"]
    assert expired.calls == future.calls == []


def test_an_encrypted_client_sends_nothing_to_an_unencrypted_server(
    server: FakeServer, ours: Authority
) -> None:
    assert says(server, ca=ours.file, key=KEY) == "Unavailable"
    assert server.calls == []


def test_a_server_that_asks_for_certificates_gets_the_clients(
    serve: Serve, ours: Authority, others: Authority
) -> None:
    clients = Authority(ours.folder / "clients")
    server = serve(ours.issue("server"), clients.file)
    mine, foreign = clients.issue("mine", "search.example"), others.issue("foreign", "x.example")
    late = clients.issue("late", "search.example", days=-1)

    def shown(pair: Pair) -> dict[str, Path]:
        return {"certificate": pair.chain, "private_key": pair.key}

    assert says(server, ca=ours.file, **shown(mine)) == "base says x"
    assert says(server, ca=ours.file) == "Unavailable"
    assert says(server, ca=ours.file, **shown(foreign)) == "Unavailable"
    assert says(server, ca=ours.file, **shown(late)) == "Unavailable"
    assert server.methods() == ["Generate"]


def test_a_chain_of_authorities_is_followed(serve: Serve, ours: Authority) -> None:
    middle = Authority(ours.folder / "middle", ours.ca.create_child_ca())
    assert says(serve(middle.issue("server")), ca=ours.file) == "base says x"


def test_a_key_goes_over_an_encrypted_connection_to_any_name(serve: Serve, ours: Authority) -> None:
    server = serve(ours.issue("server"))
    target = server.target.replace("127.0.0.1", "LOCALHOST")  # a spelling that is no loopback
    with Client(target, ca=ours.file, key=KEY) as client:
        list(client.stream("x"))
    assert server.calls[0].metadata["authorization"] == BEARER


async def test_the_asyncio_client_takes_the_same_options(serve: Serve, ours: Authority) -> None:
    server = serve(ours.issue("server"))
    async with AsyncClient(server.target, ca=ours.file, key=KEY) as client:
        assert (await client.generate("x")).text == "base says x"
        assert [delta.text async for delta in client.stream("x")] != []
    assert [call.metadata["authorization"] for call in server.calls] == [BEARER] * 2
    async with AsyncClient(server.target) as client:
        with pytest.raises(Unavailable):
            await client.generate("x")


def test_options_come_from_the_environment(
    serve: Serve, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(ours.issue("server", "example.com"))
    monkeypatch.setenv("LORAPLEX_CA", str(ours.file))
    assert says(server) == "Unavailable"
    monkeypatch.setenv("LORAPLEX_SERVER_NAME", "example.com")
    assert says(server) == "base says x"
    monkeypatch.setenv("LORAPLEX_TLS", "false")
    assert says(server) == "Unavailable"
    assert says(server, ca=ours.file) == "base says x", "an argument has precedence"
    monkeypatch.setenv("LORAPLEX_TLS", "perhaps")
    assert says(server) == "InvalidRequest"


@pytest.mark.parametrize("value", ["1", "true", "YES", " on "])
def test_tls_alone_trusts_the_systems_authorities(
    serve: Serve, ours: Authority, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    server = serve(ours.issue("server"))
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)  # gRPC's own
    monkeypatch.setenv("LORAPLEX_TLS", value)
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.file))  # where Python looks for them
    assert says(server) == "base says x"


def test_credentials_of_grpc_take_the_place_of_all_options(
    serve: Serve, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(ours.issue("server"))
    credentials = grpc.ssl_channel_credentials(ours.pem)
    monkeypatch.setenv("LORAPLEX_KEY", KEY)
    monkeypatch.setenv("LORAPLEX_CA", "/nowhere")
    assert says(server, credentials=credentials) == "base says x"
    assert "authorization" not in server.calls[0].metadata
    for option in ({"key": KEY}, {"tls": True}, {"ca": ours.file}, {"key_file": ours.file}):
        with pytest.raises(InvalidRequest, match="cannot be combined with credentials"):
            Client(server.target, credentials=credentials, **option)


def test_a_wrong_file_is_named_with_its_option_and_its_fault(
    tmp_path: Path, ours: Authority
) -> None:
    pair, other = ours.issue("one"), ours.issue("other")
    text, empty = tmp_path / "text", tmp_path / "empty"
    text.write_text("no PEM")
    empty.touch()
    locked = encrypted(pair.key, tmp_path / "locked")
    whole = {"certificate": pair.chain, "private_key": pair.key}
    cases = [
        ({"ca": tmp_path / "absent"}, "ca", "No such file"),
        ({"ca": tmp_path}, "ca", "Is a directory"),
        ({"ca": text}, "ca", "no certificate in PEM"),
        ({"ca": empty}, "ca", "no certificate in PEM"),
        ({"ca": pair.key}, "ca", "no certificate in PEM"),
        ({**whole, "private_key": tmp_path / "absent"}, "private_key", "No such file"),
        ({**whole, "private_key": other.key}, "private_key", "is not the key of"),
        ({**whole, "private_key": locked}, "private_key", "is encrypted"),
        ({**whole, "private_key": text}, "certificate", "in PEM format"),
        ({**whole, "certificate": text}, "certificate", "in PEM format"),
        ({"certificate": pair.chain}, "private_key", "is missing"),
        ({"private_key": pair.key}, "certificate", "is missing"),
        ({"ca": ours.file, "tls": False}, "ca", "tls is off"),
    ]
    for options, option, fault in cases:
        with pytest.raises(InvalidRequest, match=fault) as caught:
            Client(**options)
        assert caught.value.violations[0].field == option, options
        assert "BEGIN" not in str(caught.value)


def encrypted(key: Path, target: Path) -> Path:
    """The same private key, encrypted."""
    from cryptography.hazmat.primitives import serialization as pem

    loaded = pem.load_pem_private_key(key.read_bytes(), None)
    target.write_bytes(
        loaded.private_bytes(
            pem.Encoding.PEM,
            pem.PrivateFormat.PKCS8,
            pem.BestAvailableEncryption(b"secret"),
        )
    )
    return target


# the command line


@pytest.fixture
def run() -> Callable[..., Any]:
    def invoke(*arguments: str, **variables: str) -> Any:
        runner = CliRunner(env=variables)
        return runner.invoke(app, arguments, catch_exceptions=False)

    return invoke


def test_the_command_line_takes_the_options_before_and_after_the_command(
    serve: Serve, ours: Authority, tmp_path: Path, run: Callable[..., Any]
) -> None:
    server = serve(ours.issue("server"))
    key = tmp_path / "key"
    key.write_text(KEY)
    access = ("--server", server.target, "--ca", str(ours.file), "--key-file", str(key))
    for arguments in ((*access, "generate", "x"), ("generate", "x", *access)):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (0, "base says x\n"), result.stderr
    result = run(*access[:4], "adapters", "list", "--json", LORAPLEX_KEY_FILE=str(key))
    assert result.exit_code == 0, result.stderr
    assert {call.metadata["authorization"] for call in server.calls} == {BEARER}


def test_the_command_line_refuses_to_send_a_key_in_clear(run: Callable[..., Any]) -> None:
    result = run("generate", "x", "--server", "example.com:1", LORAPLEX_KEY=KEY)
    assert result.exit_code == 2
    assert "would not be encrypted" in result.stderr
    assert KEY not in result.output
    result = run("generate", "x", "--server", "https://example.com")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give HOST:PORT" in result.stderr


def test_health_needs_no_key_and_sends_none(
    server: FakeServer, run: Callable[..., Any], tmp_path: Path
) -> None:
    unusable = {"LORAPLEX_KEY": KEY, "LORAPLEX_KEY_FILE": str(tmp_path / "absent")}
    for variables in ({}, {"LORAPLEX_KEY": KEY}, unusable):
        result = run("health", "--server", server.target, **variables)
        assert (result.exit_code, result.stdout) == (0, "serving\n"), result.stderr
    assert all("authorization" not in call.metadata for call in server.calls)
    result = run("health", "--server", "nowhere.invalid:1", LORAPLEX_KEY=KEY)
    assert result.exit_code == 4, "an address in clear is no reason to refuse a health check"


def test_help_shows_no_key(run: Callable[..., Any]) -> None:
    for arguments in (("--help",), ("generate", "--help"), ("adapters", "upload", "--help")):
        shown = run(*arguments, LORAPLEX_KEY=KEY, LORAPLEX_KEY_FILE="/run/secret-place").output
        assert "--key-file" in shown
        assert KEY not in shown
        assert "secret-place" not in shown


def test_there_is_no_option_that_puts_a_key_on_the_command_line(run: Callable[..., Any]) -> None:
    result = run("generate", "x", "--key", KEY)
    assert result.exit_code == 2
    assert "No such option" in result.stderr
