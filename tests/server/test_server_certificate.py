"""Files of TLS: what is wrong with them is found before a client meets it, and said in one line."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519
from loraplex_model.base.refusal import Refusal
from loraplex_server.access.identity.server_certificate import MAX_PEM_BYTES, CertificateFiles
from loraplex_server.rpc.transport import LOOK_SECONDS, ServerTls
from loraplex_server.series import Series
from prometheus_client import CollectorRegistry
from rpc.certificates import Authority, Pair
from server.test_start_failures import engine_finds_the_oracle, starts

__all__ = ["engine_finds_the_oracle"]

SETTINGS = 2


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def pair(tmp_path: Path, ours: Authority) -> Pair:
    made = ours.issue("server")
    return Pair(Path(shutil.copy(made.chain, tmp_path / "c")), _copy(made.key, tmp_path / "k"))


def _copy(source: Path, target: Path) -> Path:
    shutil.copy(source, target)
    target.chmod(0o600)
    return target


def write_key(key: object, path: Path, password: bytes | None = None) -> None:
    how = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    path.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how))


def load_key(path: Path) -> object:
    return pem.load_pem_private_key(path.read_bytes(), None)


def traditional(pair: Pair) -> None:
    key = load_key(pair.key)
    how = pem.BestAvailableEncryption(b"secret")
    form = pem.PrivateFormat.TraditionalOpenSSL
    pair.key.write_bytes(key.private_bytes(pem.Encoding.PEM, form, how))


def swapped(pair: Pair) -> None:
    chain, key = pair.chain.read_bytes(), pair.key.read_bytes()
    pair.chain.write_bytes(key)
    pair.key.write_bytes(chain)


def authority_first(pair: Pair) -> None:
    other = Authority(pair.chain.parent / "o")
    pair.chain.write_bytes(other.pem + pair.chain.read_bytes())


def expired(pair: Pair) -> None:
    late = Authority(pair.chain.parent / "late").issue("late", days=-1)
    shutil.copy(late.chain, pair.chain)
    shutil.copy(late.key, pair.key)


def foreign_key(pair: Pair) -> None:
    shutil.copy(Authority(pair.chain.parent / "o").issue("o").key, pair.key)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


FAULTS: dict[str, tuple[Callable[[Pair], object], str, str]] = {
    "no certificate": (lambda p: p.chain.unlink(), "tls_certificate", "No such file"),
    "no key": (lambda p: p.key.unlink(), "tls_key", "No such file"),
    "a folder": (lambda p: folder(p.chain), "tls_certificate", "Is a directory"),
    "a pipe": (lambda p: fifo(p.key), "tls_key", "is not a file"),
    "a loop of links": (lambda p: loop(p.chain), "tls_certificate", "Too many levels"),
    "an empty certificate": (lambda p: p.chain.write_bytes(b""), "tls_certificate", "no cert"),
    "an empty key": (lambda p: p.key.write_bytes(b""), "tls_key", "no private key"),
    "text": (lambda p: p.chain.write_text("hello ✓"), "tls_certificate", "no certificate in PEM"),
    "bytes": (lambda p: p.key.write_bytes(bytes(range(256))), "tls_key", "no private key in PEM"),
    "DER": (lambda p: p.chain.write_bytes(b"\x30\x82" * 99), "tls_certificate", "PEM"),
    "a cut certificate": (
        lambda p: p.chain.write_bytes(p.chain.read_bytes()[:-50]), "tls_certificate", "",
    ),
    "a damaged certificate": (
        lambda p: p.chain.write_bytes(p.chain.read_bytes()[:100] + b"####"
                                      + p.chain.read_bytes()[104:]), "tls_certificate", "damaged",
    ),
    "a cut key": (lambda p: p.key.write_bytes(p.key.read_bytes()[:90]), "tls_key", "no private"),
    "swapped": (swapped, "tls_certificate", "no certificate in PEM"),
    "another key": (foreign_key, "tls_key", "is not the key of the certificate"),
    "the authority first": (authority_first, "tls_certificate", "must begin with the server's own"),
    "an encrypted key": (
        lambda p: write_key(load_key(p.key), p.key, b"secret"), "tls_key", "is encrypted",
    ),
    "an encrypted key in the old form": (traditional, "tls_key", "is encrypted"),
    "a key of Ed25519": (
        lambda p: write_key(ed25519.Ed25519PrivateKey.generate(), p.key), "tls_key", "RSA or ECDSA",
    ),
    "a key of DSA": (
        lambda p: write_key(dsa.generate_private_key(1024), p.key), "tls_key", "RSA or ECDSA",
    ),
    "a curve that gRPC does not know": (
        lambda p: write_key(ec.generate_private_key(ec.SECP256K1()), p.key), "tls_key", "P-384",
    ),
    "a curve that gRPC does not offer": (
        lambda p: write_key(ec.generate_private_key(ec.SECP521R1()), p.key), "tls_key", "P-384",
    ),
    "a byte order mark": (
        lambda p: p.key.write_bytes(b"\xef\xbb\xbf" + p.key.read_bytes()), "tls_key", "byte order",
    ),
    "an expired certificate": (expired, "tls_certificate", "expired on 20"),
    "too large": (
        lambda p: p.chain.write_bytes(b"x" * (MAX_PEM_BYTES + 1)), "tls_certificate", "more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_file(pair: Pair, name: str) -> None:
    damage, setting, text = FAULTS[name]
    damage(pair)
    files = CertificateFiles(pair.chain, pair.key)
    with pytest.raises(Refusal) as caught:
        files.check(files.read(), time.time())
    place = pair.chain if setting == "tls_certificate" else pair.key
    assert caught.value.message.startswith(f"{setting} {place}: "), caught.value.message
    assert text in caught.value.message
    assert "BEGIN" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["no key", "text", "another key", "an encrypted key",
                                  "an expired certificate"])  # fmt: skip
def test_a_server_does_not_start_with_it(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, setting, text = FAULTS[name]
    damage(pair)
    code, line = starts(tmp_path, capsys, tls_certificate=pair.chain, tls_key=pair.key)
    assert code == SETTINGS
    assert line.startswith(f"error: {setting} {tmp_path}")
    assert text in line


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA"])
def test_a_client_authority_that_holds_no_certificate_is_refused(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    authority = tmp_path / "ca"
    authority.write_bytes(content)
    settings = {"tls_certificate": pair.chain, "tls_key": pair.key, "tls_client_ca": authority}
    code, line = starts(tmp_path, capsys, **settings)
    assert code == SETTINGS
    assert line.startswith(f"error: tls_client_ca {authority}: ")


@pytest.mark.parametrize("kind", list(trustme.KeyType))
def test_certificates_with_either_kind_of_key_and_with_chains_are_accepted(
    tmp_path: Path, kind: trustme.KeyType
) -> None:
    root = trustme.CA(key_type=kind)
    for number, authority in enumerate((root, root.create_child_ca())):
        made = Authority(tmp_path / f"{number}", authority).issue("server", key_type=kind)
        files = CertificateFiles(made.chain, made.key)
        assert files.check(files.read(), time.time()).expires > time.time() + 29 * 86_400


def test_links_are_followed_as_kubernetes_makes_them(tmp_path: Path, ours: Authority) -> None:
    first, second = ours.issue("first"), ours.issue("second")
    for name, made in (("..one", first), ("..two", second)):
        (tmp_path / name).mkdir()
        shutil.copy(made.chain, tmp_path / name / "tls.crt")
        shutil.copy(made.key, tmp_path / name / "tls.key")
    (tmp_path / "..data").symlink_to("..one")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    clock = Clock()
    tls = opened(CertificateFiles(tmp_path / "tls.crt", tmp_path / "tls.key"), clock)
    before = tls.look()
    (tmp_path / "..next").symlink_to("..two")
    (tmp_path / "..next").replace(tmp_path / "..data")
    clock.now += LOOK_SECONDS
    assert tls.look().pem.chain == second.chain.read_bytes() != before.pem.chain


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(files: CertificateFiles, clock: Clock, series: Series | None = None) -> ServerTls:
    return ServerTls(files, series or Series(CollectorRegistry()), clock)


def test_the_files_are_read_at_most_once_a_second(
    pair: Pair, ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = CertificateFiles.read
    monkeypatch.setattr(
        CertificateFiles,
        "read",
        lambda self: reads.append(1) or read(self),  # type: ignore[func-returns-value]
    )
    clock = Clock()
    tls = opened(CertificateFiles(pair.chain, pair.key), clock)
    for _ in range(50):
        tls.look()
        clock.now += LOOK_SECONDS / 10
    assert len(reads) == 1 + 4


def test_written_byte_by_byte_it_is_the_old_pair_or_the_new_one(
    pair: Pair, ours: Authority
) -> None:
    middle = Authority(ours.folder / "middle", ours.ca.create_child_ca())
    new = middle.issue("new")  # a chain of two certificates
    chain, key = new.chain.read_bytes(), new.key.read_bytes()
    clock = Clock()
    tls = opened(CertificateFiles(pair.chain, pair.key), clock)
    old = tls.look()
    pair.key.write_bytes(key)
    leaf = chain.index(b"-----END CERTIFICATE-----") + len(b"-----END CERTIFICATE-----")
    for end in [*range(0, leaf, 37), leaf - 1]:
        pair.chain.write_bytes(chain[:end])
        clock.now += LOOK_SECONDS
        assert tls.look() is old, end
    for end in range(leaf + 6, len(chain) - 1, 37):
        pair.chain.write_bytes(chain[:end])
        clock.now += LOOK_SECONDS
        assert tls.look() is old, end
    pair.chain.write_bytes(chain)
    clock.now += LOOK_SECONDS
    assert tls.look().pem.chain == chain


def test_a_file_changed_within_its_time_stamp_is_noticed(pair: Pair, ours: Authority) -> None:
    clock = Clock()
    tls = opened(CertificateFiles(pair.chain, pair.key), clock)
    tls.look()
    times = [os.stat(path) for path in (pair.chain, pair.key)]
    new = ours.issue("new")
    for source, path, stamp in zip((new.chain, new.key), (pair.chain, pair.key), times,
                                   strict=True):  # fmt: skip
        path.write_bytes(source.read_bytes())
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    clock.now += LOOK_SECONDS
    assert tls.look().pem.chain == new.chain.read_bytes()


def test_an_expired_pair_does_not_replace_a_valid_one(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tls = opened(CertificateFiles(pair.chain, pair.key), clock)
    old = tls.look()
    expired(pair)
    clock.now += LOOK_SECONDS
    assert tls.look() is old
    assert "expired on" in caplog.text


def test_another_fault_is_another_error_and_a_return_to_the_old_pair_is_none(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    tls = opened(CertificateFiles(pair.chain, pair.key), clock)
    whole = pair.chain.read_bytes()

    def errors_after(content: bytes) -> int:
        caplog.clear()
        pair.chain.write_bytes(content)
        for _ in range(3):
            clock.now += LOOK_SECONDS
            tls.look()
        return sum(record.levelno >= logging.ERROR for record in caplog.records)

    assert errors_after(b"") == 1
    assert errors_after(whole[:300]) == 1
    assert errors_after(whole) == 0
    assert errors_after(b"") == 1, "after the old pair was back, the fault is a new one"


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_private_key_that_everybody_can_read_is_warned_of(
    pair: Pair, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    pair.key.chmod(mode)
    opened(CertificateFiles(pair.chain, pair.key), Clock())
    assert (f"{pair.key}: all users" in caplog.text) is warned


def test_a_certificate_of_the_future_is_used_with_a_warning(
    tmp_path: Path, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    made = ours.issue("future", days=90)
    opened(CertificateFiles(made.chain, made.key), Clock())
    assert "is valid only from" in caplog.text


def test_nothing_that_can_be_shown_has_the_key_in_it(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tls = opened(CertificateFiles(pair.chain, pair.key), Clock())
    secret = pair.key.read_text().splitlines()[1]
    assert secret not in repr(tls.look()) + repr(vars(tls)) + caplog.text


def test_the_time_at_which_the_certificate_expires_is_exported(
    tmp_path: Path, ours: Authority
) -> None:
    registry = CollectorRegistry()
    made = ours.issue("server", days=5)
    opened(CertificateFiles(made.chain, made.key), Clock(), Series(registry))
    value = registry.get_sample_value("loraplex_tls_certificate_expiry_timestamp_seconds")
    assert value == pytest.approx(time.time() + 5 * 86_400, abs=60)
