"""TLS of the gRPC port: whom the server accepts, and new certificates while it serves."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509
from loraplex.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from loraplex_server.access.identity.server_certificate import CertificateFiles
from loraplex_server.rpc import transport
from loraplex_server.series import Series
from prometheus_client import CollectorRegistry
from rpc.certificates import Authority, Pair
from rpc.damaged_pairs import DAMAGES, Damage
from rpc.harness import Running, ask, expected, rest, running, streamed

PROMPT = [20, 21, 22]
KINDS = list(trustme.KeyType)


@pytest.fixture(autouse=True)
def _looks_at_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LOOK_SECONDS", 0.0)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def clients(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "clients")


@pytest.fixture
def files(tmp_path: Path, ours: Authority) -> Pair:
    """The certificate that the server has at first, in the files that it reads."""
    first = ours.issue("first")
    return install(first, Pair(tmp_path / "tls.crt", tmp_path / "tls.key"))


def install(source: Pair, place: Pair) -> Pair:
    """Puts a certificate where the server reads it, whole at any time."""
    for new, old in ((source.chain, place.chain), (source.key, place.key)):
        fresh = old.with_name(f"{old.name}.new")
        shutil.copy(new, fresh)
        fresh.replace(old)
    return place


@asynccontextmanager
async def encrypted(folder: Path, files: Pair, **settings: Any) -> AsyncIterator[Running]:
    options = {"tls_certificate": files.chain, "tls_key": files.key, **settings}
    async with running(folder, **options) as up:
        yield up


_numbers = itertools.count()


def channel(up: Running, root: bytes, pair: Pair | None = None) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    own = pair.channel_arguments() if pair is not None else {}
    credentials = grpc.ssl_channel_credentials(root, **own)
    apart = [("test.connection", next(_numbers)), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(str(up.server.address), credentials, apart)


async def code(opened: grpc.aio.Channel) -> str:
    """The status of a call on a channel, which is then closed."""
    async with opened:
        try:
            await model_pb2_grpc.ModelServiceStub(opened).GetModel(model_pb2.GetModelRequest())
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


async def shown(up: Running, root: bytes) -> int:
    """The serial number of the certificate that a new connection is shown."""
    return (await handshake(up, root)).serial


class Shown:
    def __init__(self, connection: ssl.SSLObject | Any) -> None:
        der = connection.getpeercert(binary_form=True)
        self.serial = x509.load_der_x509_certificate(der).serial_number
        self.protocol = connection.selected_alpn_protocol()
        self.version = connection.version()


async def handshake(up: Running, root: bytes, **versions: ssl.TLSVersion) -> Shown:
    context = ssl.create_default_context(cadata=root.decode())
    context.set_alpn_protocols(["h2"])
    for name, version in versions.items():
        setattr(context, name, version)
    _, writer = await asyncio.open_connection(
        up.server.address.host, up.server.address.port, ssl=context, server_hostname="localhost"
    )
    try:
        return Shown(writer.get_extra_info("ssl_object"))
    finally:
        writer.close()


def serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificates(pair.chain.read_bytes())[0].serial_number


async def test_only_clients_that_encrypt_and_trust_the_authority_are_served(
    tmp_path: Path, files: Pair, ours: Authority, clients: Authority
) -> None:
    async with encrypted(tmp_path, files) as up:
        assert await code(channel(up, ours.pem)) == "OK"
        assert await code(channel(up, clients.pem)) == "UNAVAILABLE"
        plain = grpc.aio.insecure_channel(str(up.server.address))
        assert await code(plain) == "UNAVAILABLE"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_connections_are_http2_over_a_current_version_of_tls(
    tmp_path: Path, files: Pair, ours: Authority, version: ssl.TLSVersion
) -> None:
    async with encrypted(tmp_path, files) as up:
        found = await handshake(up, ours.pem, minimum_version=version, maximum_version=version)
        assert (found.protocol, found.serial) == ("h2", serial(files))
        assert found.version == version.name.replace("_", ".")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_versions_of_tls_before_1_2_are_refused(
    tmp_path: Path, files: Pair, ours: Authority
) -> None:
    async with encrypted(tmp_path, files) as up:
        context = ssl.create_default_context(cadata=ours.pem.decode())
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            await asyncio.open_connection(
                "127.0.0.1", up.server.address.port, ssl=context, server_hostname="localhost"
            )


async def test_with_a_client_authority_every_client_must_show_a_certificate_of_it(
    tmp_path: Path, files: Pair, ours: Authority, clients: Authority
) -> None:
    async with encrypted(tmp_path, files, tls_client_ca=clients.file) as up:
        right = clients.issue("right", "search.example")
        foreign = ours.issue("foreign", "search.example")
        late = clients.issue("late", "search.example", days=-1)
        assert await code(channel(up, ours.pem, right)) == "OK"
        assert await code(channel(up, ours.pem)) == "UNAVAILABLE"
        assert await code(channel(up, ours.pem, foreign)) == "UNAVAILABLE"
        assert await code(channel(up, ours.pem, late)) == "UNAVAILABLE"


async def test_new_connections_get_the_new_certificate_and_running_streams_go_on(
    tmp_path: Path, files: Pair, ours: Authority
) -> None:
    slow = {"step_seconds": 0.005, "num_blocks": 1024}
    async with encrypted(tmp_path, files, engine_options=slow) as up:
        expiry = up.metric("tls_certificate_expiry_timestamp_seconds")
        async with channel(up, ours.pem) as old:
            stub = generation_pb2_grpc.GenerationServiceStub(old)
            stream = stub.GenerateStream(streamed(ask(*PROMPT, new=60)))
            await stream.read()
            for number in range(3):
                second = ours.issue(f"second-{number}", days=40 + number)
                install(second, files)
                assert await shown(up, ours.pem) == serial(second)
            tokens = [token for event in await rest(stream) for token in event.delta.token_ids]
            assert tokens == expected(PROMPT, 60)
            assert (await stub.Generate(ask(*PROMPT))).token_ids == expected(PROMPT, 8)
        assert up.metric("tls_reloads_total", result="ok") == 3
        assert up.metric("tls_reloads_total", result="error") == 0
        later = up.metric("tls_certificate_expiry_timestamp_seconds") - expiry
        assert later == pytest.approx(12 * 86_400, abs=60)


async def test_no_call_fails_while_certificates_are_replaced(
    tmp_path: Path, files: Pair, ours: Authority
) -> None:
    async with encrypted(tmp_path, files) as up:
        over = asyncio.Event()
        codes: list[str] = []

        async def traffic() -> None:
            while not over.is_set():
                codes.append(await code(channel(up, ours.pem)))

        workers = [asyncio.create_task(traffic()) for _ in range(4)]
        for number in range(10):
            install(ours.issue(f"n{number}", key_type=KINDS[number % 2]), files)
            enough = len(codes) + 8
            while len(codes) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        over.set()
        await asyncio.gather(*workers)
        assert set(codes) == {"OK"}
        assert up.metric("tls_reloads_total", result="ok") == 10


async def test_a_replaced_client_authority_holds_for_new_connections(
    tmp_path: Path, files: Pair, ours: Authority, clients: Authority
) -> None:
    place = tmp_path / "client-ca.pem"
    place.write_bytes(clients.pem)
    successor = Authority(tmp_path / "successor")
    before, after = clients.issue("a", "a.example"), successor.issue("b", "b.example")
    async with encrypted(tmp_path, files, tls_client_ca=place) as up:
        assert await code(channel(up, ours.pem, before)) == "OK"
        assert await code(channel(up, ours.pem, after)) == "UNAVAILABLE"
        place.write_bytes(successor.pem)
        assert await code(channel(up, ours.pem, after)) == "OK"
        assert await code(channel(up, ours.pem, before)) == "UNAVAILABLE"
        place.write_bytes(clients.pem + successor.pem)
        assert await code(channel(up, ours.pem, after)) == "OK"
        assert await code(channel(up, ours.pem, before)) == "OK"
        place.write_bytes(b"")
        assert await code(channel(up, ours.pem, before)) == "OK", "no file admits everybody"
        assert await code(channel(up, ours.pem)) == "UNAVAILABLE"


async def test_every_port_gets_the_new_certificate(files: Pair, ours: Authority) -> None:
    tls = transport.ServerTls(CertificateFiles(files.chain, files.key), Series(CollectorRegistry()))
    servers = [grpc.aio.server() for _ in range(2)]
    ports = [each.add_secure_port("127.0.0.1:0", tls.credentials()) for each in servers]
    for server in servers:
        await server.start()
    for name in ("second", "third"):
        install(ours.issue(name), files)
        for port in ports:
            assert await asyncio.to_thread(peer_serial, port, ours.pem) == serial(files)
    for server in servers:
        await server.stop(None)


def peer_serial(port: int, root: bytes) -> int:
    context = ssl.create_default_context(cadata=root.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return Shown(connection).serial


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_half_written_pair_keeps_the_one_before_until_it_is_whole(
    tmp_path: Path,
    files: Pair,
    ours: Authority,
    caplog: pytest.LogCaptureFixture,
    damage: Damage,
) -> None:
    first, new = serial(files), ours.issue("new")
    async with encrypted(tmp_path, files) as up:
        damage(new, files)
        for _ in range(3):
            assert await shown(up, ours.pem) == first
        errors = [r.getMessage() for r in caplog.records if "stays in use" in r.getMessage()]
        assert len(errors) == 1, "one error, whatever the number of connections"
        assert str(tmp_path) in errors[0]
        assert up.metric("tls_reloads_total", result="error") == 3
        install(new, files)
        assert await shown(up, ours.pem) == serial(new)
        assert up.metric("tls_reloads_total", result="ok") == 1
