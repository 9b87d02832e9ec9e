"""Files of principals and keys for tests, and a clock that tests set."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.identity.credentials import Credentials
from loraplex_server.access.identity.directory import PrincipalDirectory, open_directory
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.settings import ServerSettings

PRINCIPALS = """
[principals.search]
roles = ["infer", "read"]
adapters = "team=search"
certificates = ["search.example"]
subjects = ["auth0|7"]

[principals.ops]
roles = ["infer", "read", "register", "admin", "train"]
adapters = "*"
certificates = ["ops.example", "ops-2.example"]
"""

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **amount: float) -> None:
        """Moves on, or back, by an amount as `timedelta` takes it."""
        self.now += timedelta(**amount)


def settings(folder: Path, principals: str = PRINCIPALS, **more: Any) -> ServerSettings:
    """Settings with the file of principals and the place of the keys below `folder`."""
    (folder / "principals.toml").write_text(principals)
    return ServerSettings(principals=folder / "principals.toml", keys=folder / "keys.json", **more)


def directory(folder: Path, clock: Clock | None = None, **more: Any) -> PrincipalDirectory:
    """The directory with these settings."""
    opened = open_directory(settings(folder, **more), clock or Clock())
    assert opened is not None
    return opened


def replace(path: Path, content: bytes | str) -> None:
    """Replaces a file as `keys` does: by a new one that takes its place."""
    data = content.encode() if isinstance(content, str) else content
    fresh = path.with_name(f"{path.name}.fresh")
    fresh.write_bytes(data)
    fresh.chmod(0o600)
    os.replace(fresh, path)


def bearer(text: str) -> Credentials:
    """Credentials with a key or a token."""
    return Credentials(f"Bearer {text}")


def why_refused(known: PrincipalDirectory, credentials: Credentials) -> str:
    """Why credentials are refused, for the operator. They must be refused as all others are."""
    with pytest.raises(Refusal) as refused:
        known.identify(credentials)
    assert refused.value.reason is Reason.CREDENTIALS_INVALID
    assert refused.value.message == (
        "the credential is not valid: it is unknown, has expired or was revoked"
    )
    assert [problem.field for problem in refused.value.problems] == [""]
    assert isinstance(refused.value.__cause__, BadCredential)
    return str(refused.value.__cause__)
