"""Authorities and certificates of tests, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import trustme

HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its private key, in two files."""

    chain: Path
    key: Path

    def channel_arguments(self) -> dict[str, bytes]:
        """The arguments of `grpc.ssl_channel_credentials` that present it."""
        return {
            "private_key": self.key.read_bytes(),
            "certificate_chain": self.chain.read_bytes(),
        }


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority that signs certificates into `folder`."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def file(self) -> Path:
        """PEM file of the authority's own certificate."""
        path = self.folder / "ca.pem"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ca.cert_pem.write_to_path(str(path))
        return path

    @property
    def pem(self) -> bytes:
        return self.ca.cert_pem.bytes()

    def issue(self, name: str, *identities: str, days: float = 30.0, **options: Any) -> Pair:
        """A certificate for these identities (this machine if none are given), in files `name`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        end = datetime.now(UTC) + timedelta(days=days)
        made = self.ca.issue_cert(
            *(identities or HERE),
            not_before=end - timedelta(days=60),
            not_after=end,
            **options,
        )
        chain, key = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        chain.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
        return Pair(chain, key)


def server_credentials(pair: Pair, client_ca: Path | None = None) -> grpc.ServerCredentials:
    """Credentials of a test's own server."""
    return grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.chain.read_bytes())],
        client_ca.read_bytes() if client_ca is not None else None,
        client_ca is not None,
    )
