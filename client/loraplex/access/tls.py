"""Credentials of encrypted channels, from PEM files that are checked before they are used."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import NoReturn, TypeAlias

import grpc

from loraplex.errors import invalid

PathText: TypeAlias = "str | os.PathLike[str]"

# Where systems keep the authorities that they trust, if Python does not know the place.
_SYSTEM_ROOTS = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

_GRPC_ROOTS_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"


def channel_credentials(
    ca: PathText | None = None,
    certificate: PathText | None = None,
    private_key: PathText | None = None,
) -> grpc.ChannelCredentials:
    """Credentials of a channel that accepts servers of the authorities in `ca`, None: the system's.

    `certificate` and `private_key`, both or neither, are the client's own. Raises InvalidRequest,
    which names the option, the file and its fault.
    """
    roots = _system_roots() if ca is None else _authorities(ca)
    if certificate is None or private_key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, key = _read("certificate", certificate), _read("private_key", private_key)
    _require_pair(certificate, private_key)
    return grpc.ssl_channel_credentials(roots, key, chain)


def _authorities(path: PathText) -> bytes:
    data = _read("ca", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError):
        raise invalid("ca", f"{os.fspath(path)} holds no certificate in PEM format") from None
    return data


def _require_pair(certificate: PathText, private_key: PathText) -> None:
    """Raises InvalidRequest unless the two files are a certificate and its private key."""

    def no_password() -> NoReturn:
        raise invalid("private_key", f"{os.fspath(private_key)} is encrypted; store it decrypted")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_cert_chain(certificate, private_key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"{os.fspath(private_key)} is not the key of {os.fspath(certificate)}"
            raise invalid("private_key", message) from None
        message = (
            f"{os.fspath(certificate)} and {os.fspath(private_key)} are not a certificate and its "
            "private key in PEM format"
        )
        raise invalid("certificate", message) from None


def _read(option: str, path: PathText) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise invalid(option, f"{os.fspath(path)}: {error.strerror}") from None


def _system_roots() -> bytes | None:
    """The authorities that the system trusts; None for those that gRPC brings along."""
    if os.environ.get(_GRPC_ROOTS_VARIABLE):
        return None  # gRPC reads that file itself
    for place in (ssl.get_default_verify_paths().cafile, *_SYSTEM_ROOTS):
        if place and Path(place).is_file():
            return _read("tls", place)
    return None
