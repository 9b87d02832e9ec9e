"""The server's certificate: the files of TLS, and what can be wrong with them."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import PublicKeyAlgorithmOID
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.settings import ServerSettings

MAX_PEM_BYTES: Final = 1 << 20
"""Largest file of TLS."""

_BEGIN: Final = b"-----BEGIN CERTIFICATE-----"
_DASHES: Final = b"-----"
"""A whole block has four of these."""
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
"""Curves with which gRPC completes a handshake."""

_UNUSABLE: Final = "is of a kind that gRPC cannot use; use RSA or ECDSA (P-256 or P-384)"


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Where the server's certificate is; see the settings tls_certificate and the like.

    Attributes:
        chain: the server's certificate and those of intermediate authorities.
        key: the private key of the server's certificate.
        client_ca: authorities of clients' certificates; None if clients need none.
    """

    chain: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, settings: ServerSettings) -> CertificateFiles | None:
        """The files that the settings name; None if connections are not encrypted."""
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        return cls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)

    def read(self) -> PemFiles:
        """Reads the files. Raises Refusal(CONFIG_INVALID) that names one that cannot be read."""
        return PemFiles(
            _content("tls_certificate", self.chain),
            _content("tls_key", self.key),
            _content("tls_client_ca", self.client_ca) if self.client_ca is not None else None,
        )

    def check(self, read: PemFiles, now: float) -> ServerCertificate:
        """Checks what `read` returned, at the Unix time `now`.

        Raises Refusal(CONFIG_INVALID) that names the file and what is wrong with it.
        """
        certificates = _certificates("tls_certificate", self.chain, read.chain)
        key = _key("tls_key", self.key, read.key)
        own = certificates[0]
        if _public(own) != key:
            if key in map(_public, certificates[1:]):
                raise _fault("tls_certificate", self.chain, "must begin with the server's own "
                             "certificate; those of authorities follow it")  # fmt: skip
            raise _fault("tls_key", self.key, f"is not the key of the certificate in {self.chain}")
        if own.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
            raise _fault("tls_certificate", self.chain, _UNUSABLE)
        expires = own.not_valid_after_utc.timestamp()
        if expires <= now:
            raise _fault("tls_certificate", self.chain, f"expired on {date(expires)}")
        if self.client_ca is not None and read.client_ca is not None:
            _certificates("tls_client_ca", self.client_ca, read.client_ca)
        return ServerCertificate(read, expires, own.not_valid_before_utc.timestamp())

    def warnings(self, certificate: ServerCertificate, now: float) -> Sequence[str]:
        """What the operator should know of files that can be used all the same."""
        found = []
        if certificate.begins > now:
            found.append(f"{self.chain} is valid only from {date(certificate.begins)} on")
        if _is_open_to_others(self.key):
            found.append(f"{self.key}: all users of this machine can read the private key")
        return found


@dataclass(frozen=True, slots=True)
class PemFiles:
    """Content of `CertificateFiles`. `repr` shows none of it."""

    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    client_ca: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ServerCertificate:
    """Content of `CertificateFiles` that was checked.

    Attributes:
        pem: the content.
        expires, begins: Unix times between which the server's certificate is valid.
    """

    pem: PemFiles
    expires: float
    begins: float


def date(seconds: float) -> str:
    """A Unix time as text, in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M UTC}"


def _fault(setting: str, path: Path, text: str) -> Refusal:
    return Refusal(Reason.CONFIG_INVALID, f"{setting} {path}: {text}", setting)


def _content(setting: str, path: Path) -> bytes:
    try:
        # Should it be a pipe, nobody waits for its other end.
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _fault(setting, path, "is not a file")
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise _fault(setting, path, f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_PEM_BYTES:
        raise _fault(setting, path, f"has more than {MAX_PEM_BYTES} bytes")
    if data.startswith(codecs.BOM_UTF8):
        raise _fault(setting, path, "begins with a byte order mark; store it without")
    return data


def _certificates(setting: str, path: Path, data: bytes) -> list[x509.Certificate]:
    """The certificates in a PEM file, at least one."""
    if _BEGIN not in data:
        raise _fault(setting, path, "holds no certificate in PEM format")
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise _fault(setting, path, "holds a damaged certificate") from error
    if len(found) != data.count(_BEGIN) or data.count(_DASHES) % 4:
        raise _fault(setting, path, "is cut off in the middle of a certificate")
    return found


def _key(setting: str, path: Path, data: bytes) -> bytes:
    """The public part of the private key in a PEM file."""
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        text = "is encrypted; store it decrypted, readable by the server alone"
        raise _fault(setting, path, text) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _fault(setting, path, "holds no private key in PEM format") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise _fault(setting, path, _UNUSABLE)
    if isinstance(key, ec.EllipticCurvePrivateKey) and not isinstance(key.curve, _CURVES):
        raise _fault(setting, path, _UNUSABLE)
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _public(certificate: x509.Certificate) -> bytes:
    """The public key of a certificate; b"" if it is of an unknown kind."""
    try:
        public = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return b""
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _is_open_to_others(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
