"""The certificate of HTTP is replaced without a restart, and never by a wrong one."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from gateway.harness import Web, web
from loraplex_gateway import certificate
from loraplex_gateway.certificate import HttpCertificate
from loraplex_gateway.settings import SettingsError
from rpc.certificates import Authority, Pair
from rpc.damaged_pairs import DAMAGES, Damage, folder

ASK = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def files(tmp_path: Path, ours: Authority) -> Pair:
    """The certificate that the gateway has at first, in the files that it reads."""
    return install(ours.issue("first"), Pair(tmp_path / "tls.crt", tmp_path / "tls.key"))


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "LOOK_SECONDS", 0.0)


def install(source: Pair, place: Pair) -> Pair:
    """Puts a certificate where the gateway reads it, whole at any time."""
    for new, old in ((source.chain, place.chain), (source.key, place.key)):
        fresh = old.with_name(f"{old.name}.new")
        shutil.copy(new, fresh)
        fresh.replace(old)
    return place


def serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.chain.read_bytes()).serial_number


class Connection:
    """A connection to the gateway, over which a request was answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.serial = x509.load_der_x509_certificate(der).serial_number

    async def asks(self) -> bytes:
        """The first line of the answer to a request."""
        self._writer.write(ASK)
        head = await self._reader.readuntil(b"}")
        return head.splitlines()[0]

    def close(self) -> None:
        self._writer.close()


async def connect(url: str, root: bytes, name: str = "localhost") -> Connection:
    host, port = url.partition("://")[2].split(":")
    context = ssl.create_default_context(cadata=root.decode())
    streams = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
    return Connection(*streams)


async def shown(url: str, root: bytes, name: str = "localhost") -> int:
    """The serial number of the certificate that a new connection is shown."""
    connection = await connect(url, root, name)
    assert await connection.asks() == b"HTTP/1.1 200 OK"
    connection.close()
    return connection.serial


def encrypted(files: Pair) -> AbstractAsyncContextManager[Web]:
    return web("127.0.0.1:1", compared=False, certificate=files.chain, private_key=files.key)


@pytest.mark.usefixtures("looks_always")
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])  # an address is not sent as a name
async def test_new_connections_get_the_new_certificate_and_open_ones_go_on(
    files: Pair, ours: Authority, name: str
) -> None:
    async with encrypted(files) as site:
        kept = await connect(site.url, ours.pem, name)
        assert kept.serial == serial(files)
        kinds = trustme.KeyType
        for i, kind in enumerate([kinds.RSA, kinds.ECDSA, kinds.RSA]):
            new = ours.issue(f"new-{i}", key_type=kind)
            install(new, files)
            assert await shown(site.url, ours.pem, name) == serial(new)
            assert await kept.asks() == b"HTTP/1.1 200 OK"
        other = Authority(ours.folder.with_name("others"))
        install(other.issue("new"), files)
        with pytest.raises(ssl.SSLCertVerificationError):
            await shown(site.url, ours.pem, name)
        assert await shown(site.url, other.pem, name) == serial(files)
        kept.close()


@pytest.mark.usefixtures("looks_always")
@pytest.mark.parametrize("damage", [*DAMAGES, folder])
async def test_a_pair_that_is_wrong_keeps_the_one_before_and_is_logged_once(
    files: Pair, ours: Authority, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    first, new = serial(files), ours.issue("new")
    async with encrypted(files) as site:
        damage(new, files)
        for _ in range(3):
            assert await shown(site.url, ours.pem) == first
        errors = [r.getMessage() for r in caplog.records if "stays in use" in r.getMessage()]
        assert len(errors) == 1, errors
        assert str(files.chain.parent) in errors[0]
        if files.chain.is_dir():
            files.chain.rmdir()
        install(new, files)
        assert await shown(site.url, ours.pem) == serial(new)
        assert len([r for r in caplog.records if "stays in use" in r.getMessage()]) == 1


@pytest.mark.parametrize("damage", [*DAMAGES, folder])
def test_a_pair_that_is_wrong_at_the_start_is_told(
    files: Pair, ours: Authority, damage: Damage
) -> None:
    damage(ours.issue("new"), files)
    with pytest.raises(SettingsError, match=f"(certificate|private_key): .*{files.chain.parent}"):
        HttpCertificate(files.chain, files.key)


def test_the_files_are_looked_at_once_in_a_second(files: Pair, ours: Authority) -> None:
    now = 0.0
    held = HttpCertificate(files.chain, files.key, lambda: now)

    class Begun:
        context = held.context

    def begin() -> ssl.SSLContext:
        begun = Begun()
        held._choose(begun, None, held.context)  # type: ignore[arg-type]
        return begun.context

    install(ours.issue("new"), files)
    assert begin() is held.context
    now = 1.0
    assert (second := begin()) is not held.context
    now = 2.0
    assert begin() is second  # the files are the same


async def test_a_process_takes_a_new_certificate_without_a_restart(
    files: Pair, ours: Authority
) -> None:
    command = [
        sys.executable, "-m", "loraplex_gateway", "--port", "0", "--target", "127.0.0.1:1",
        "--certificate", str(files.chain), "--private-key", str(files.key),
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        url = line.replace("ready: http ", "http://").strip()
        assert await shown(url, ours.pem) == serial(files)
        first, new = serial(files), ours.issue("new")
        files.chain.write_bytes(b"")
        assert await shown(url, ours.pem) == first
        install(new, files)
        while await shown(url, ours.pem) != serial(new):  # noqa: ASYNC110 - a look in a second
            await asyncio.sleep(0.05)
    finally:
        process.terminate()
        _, errors = await process.communicate()
    assert process.returncode == 0
    assert errors.count(b"stays in use") <= 1
