"""Keys: what a caller sends, and what the server keeps of it.

A key is written `lpx_<id>_<secret>`. The secret is 256 random bits, so a plain SHA-256 of it cannot
be inverted, and the file of keys is worth nothing to whoever reads it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from loraplex_server.access.identity.refused import BadCredential

PREFIX: Final = "lpx"
"""First part of every key, by which scanners of secrets can find one."""

MAX_NOTE: Final = 200
"""Most characters of a key's note."""

_ID_BYTES: Final = 5
_SECRET_BYTES: Final = 32
_HEX: Final = frozenset("0123456789abcdef")
_NO_HASH: Final = "0" * 64
"""Compared with the secret of an unknown id, which then takes the time of a known one."""


class KeyState(StrEnum):
    """Whether a key is accepted."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


class IssuedKey(BaseModel):
    """A key as the server keeps it: without its secret.

    Attributes:
        id: the part of the key that names it; not secret.
        principal: name of the principal that it belongs to.
        sha256: SHA-256 of the secret, in hex.
        created: when it was made.
        expires: from when on it is refused; None for never.
        revoked: when it was revoked; None if it was not. A time in the future counts, too.
        note: the operator's words about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * _ID_BYTES}}}$")]
    principal: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", repr=False)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    note: Annotated[str, Field(max_length=MAX_NOTE)] = ""

    def state(self, now: datetime) -> KeyState:
        """Whether the key is accepted at a time."""
        if self.revoked is not None:
            return KeyState.REVOKED
        if self.expires is not None and self.expires <= now:
            return KeyState.EXPIRED
        return KeyState.ACTIVE


def is_key(text: str) -> bool:
    """Whether a bearer credential is meant as a key, well formed or not."""
    return text.startswith(f"{PREFIX}_")


def split(text: str) -> tuple[str, str] | None:
    """Id and secret of a key; None if the text is no key."""
    prefix, _, rest = text.partition("_")
    key_id, _, secret = rest.partition("_")
    well_formed = prefix == PREFIX and _is_hex(key_id, _ID_BYTES) and _is_hex(secret, _SECRET_BYTES)
    return (key_id, secret) if well_formed else None


def issue(
    principal: str,
    *,
    taken: Mapping[str, IssuedKey],
    now: datetime,
    expires: datetime | None = None,
    note: str = "",
) -> tuple[IssuedKey, str]:
    """A new key and its text, which is not kept anywhere. Its id is none of those `taken`."""
    secret = secrets.token_hex(_SECRET_BYTES)
    key_id = secrets.token_hex(_ID_BYTES)
    while key_id in taken:
        key_id = secrets.token_hex(_ID_BYTES)
    key = IssuedKey(
        id=key_id,
        principal=principal,
        sha256=_hash(secret),
        created=now,
        expires=expires,
        note=note,
    )
    return key, f"{PREFIX}_{key_id}_{secret}"


def accept(text: str, known: Mapping[str, IssuedKey], now: datetime) -> IssuedKey:
    """The known key with this text, if it is active. Raises BadCredential."""
    parts = split(text)
    if parts is None:
        raise BadCredential("a key that is malformed")
    key_id, secret = parts
    key = known.get(key_id)
    expected = _NO_HASH if key is None else key.sha256
    # Ids are no secrets. The time of the comparison must not tell how much of a hash was right.
    matches = hmac.compare_digest(_hash(secret), expected)
    if key is None:
        raise BadCredential(f"key {key_id}, which is unknown")
    if not matches:
        raise BadCredential(f"key {key_id}, with a wrong secret")
    if (state := key.state(now)) is not KeyState.ACTIVE:
        raise BadCredential(f"key {key_id} of {key.principal}, which is {state}")
    return key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _is_hex(text: str, size: int) -> bool:
    return len(text) == 2 * size and set(text) <= _HEX
