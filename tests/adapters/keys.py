"""Keys and policies of signatures."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def make_key(
    folder: Path, name: str, curve: ec.EllipticCurve | None = None, password: bytes = b""
) -> bytes:
    """Writes `name`.pem, a public key, to a folder; returns the PEM of the private key."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(curve or ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(public)
    locked = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)


def rsa_key() -> bytes:
    """The PEM of a public key that is not elliptic."""
    key = rsa.generate_private_key(65537, 2048).public_key()
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_policy(folder: Path, *lines: str, **names: list[str]) -> Path:
    """Writes policy.toml: `lines`, and the keys by name with the names that they may sign for."""
    tables = [
        f'[keys.{key}]\npublic_key = "{key}.pem"\nnames = {prefixes!r}'
        for key, prefixes in names.items()
    ]
    file = folder / "policy.toml"
    file.write_text("\n".join([*lines, *tables]))
    return file
