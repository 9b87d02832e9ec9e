"""The directory of principals: finds out which principal sent a call's credentials."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from loraplex_server.access.identity import keys, refused
from loraplex_server.access.identity.credentials import Credentials
from loraplex_server.access.identity.key_file import read_keys
from loraplex_server.access.identity.keys import IssuedKey
from loraplex_server.access.identity.principals_file import KnownPrincipals, read_principals
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.access.identity.watched_file import WatchedFile
from loraplex_server.access.principals import Principal
from loraplex_server.series import Series
from loraplex_server.settings import ServerSettings

log = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 1.0
"""Seconds between two looks at the files."""

MAX_AUTHORIZATION: Final = (8 << 10) + len("Bearer ")
"""Most characters of the metadata `authorization`."""


class Verifier(Protocol):
    """Checks signed tokens; `tokens.TokenVerifier`, which is imported only if it is needed."""

    def subject(self, token: str, now: float) -> str:
        """The subject of a valid token at a Unix time. Raises BadCredential."""


class PrincipalDirectory:
    """The principals and their credentials, as the files say now.

    `identify` may be called from any thread while `refresh` runs in another. Times are those of the
    system's clock: a key that has expired is accepted again while the clock is set back before its
    end. A revoked key is refused whatever the clock says.
    """

    def __init__(
        self,
        principals: WatchedFile[KnownPrincipals],
        known_keys: WatchedFile[Mapping[str, IssuedKey]],
        tokens: WatchedFile[Verifier] | None,
        clock: Callable[[], datetime],
    ) -> None:
        """`tokens` is None where tokens are not accepted."""
        self._principals = principals
        self._keys = known_keys
        self._tokens = tokens
        self._clock = clock
        watched = (principals, known_keys, tokens)
        self._files: list[WatchedFile[Any]] = [each for each in watched if each is not None]

    @property
    def principals(self) -> Mapping[str, Principal]:
        """All principals by name."""
        return self._principals.value.by_name

    def identify(self, credentials: Credentials) -> Principal:
        """The principal that these credentials belong to; reads no file.

        A bearer credential decides alone, even if it is not valid and there is a certificate.
        Raises Refusal(CREDENTIALS_MISSING) if there are none, and Refusal(CREDENTIALS_INVALID) if
        they are unknown, malformed, expired or revoked, with the same text for all of these. The
        cause of the latter is a BadCredential, which says why: for the audit log.
        """
        if not (credentials.authorization or credentials.certificate):
            raise refused.missing()
        try:
            if credentials.authorization:
                return self._bearer(credentials.authorization)
            return self._certified(credentials.certificate)
        except BadCredential as why:
            raise refused.invalid() from why

    def refresh(self) -> bool:
        """Takes in files that have changed; returns whether the content of all files is good.

        Blocks on the disk. A file that is wrong or unreadable changes nothing: the fault is logged
        once, and what the file said before holds. Every file is taken in by itself, so that a fault
        in one does not keep a key of another from being revoked.
        """
        for file in self._files:
            before = file.fault
            if file.refresh():
                log.info("%s was read again", file.path)
            if file.fault and file.fault != before:
                log.error("a file is wrong, and what it said before holds: %s", file.fault)
        return not any(file.fault for file in self._files)

    async def watch(self, series: Series) -> None:
        """Refreshes once a second, in a thread, until it is cancelled."""
        while True:
            good = await asyncio.to_thread(self.refresh)
            series.access_reload_failed.set(not good)
            await asyncio.sleep(REFRESH_SECONDS)

    def _bearer(self, authorization: str) -> Principal:
        if len(authorization) > MAX_AUTHORIZATION:
            raise BadCredential(f"metadata of more than {MAX_AUTHORIZATION} characters")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise BadCredential("metadata that does not begin with Bearer")
        text = text.strip(" ")
        now = self._clock()
        if keys.is_key(text) or self._tokens is None:
            key = keys.accept(text, self._keys.value, now)
            owner = self._principals.value.by_name.get(key.principal)
            if owner is None:
                raise BadCredential(f"key {key.id} of {key.principal}, who is no principal now")
            return owner
        subject = self._tokens.value.subject(text, now.timestamp())
        owner = self._principals.value.subjects.get(subject)
        if owner is None:
            raise BadCredential(f"a token whose subject {subject[:256]!r} is no principal's")
        return owner

    def _certified(self, names: frozenset[str]) -> Principal:
        known = self._principals.value.certificates
        owners = {known[name].name: known[name] for name in names if name in known}
        if len(owners) > 1:
            raise BadCredential(f"a certificate of several principals: {', '.join(sorted(owners))}")
        if not owners:
            raise BadCredential(f"a certificate that is no principal's: {_shown(names)}")
        return next(iter(owners.values()))


def _utc_now() -> datetime:
    return datetime.now(UTC)


def open_directory(
    settings: ServerSettings, clock: Callable[[], datetime] = _utc_now
) -> PrincipalDirectory | None:
    """Reads the files of principals and credentials; None if callers are not authenticated.

    Raises Refusal(CONFIG_INVALID), whose message names the file and every fault in it.
    """
    if settings.principals is None:
        return None
    tokens: WatchedFile[Verifier] | None = None
    if settings.jwks is not None:
        from loraplex_server.access.identity.tokens import TokenVerifier, read_key_set

        def verifier(path: Path) -> Verifier:
            return TokenVerifier(read_key_set(path), settings.jwt_issuer, settings.jwt_audience)

        tokens = WatchedFile(settings.jwks, verifier)
    return PrincipalDirectory(
        WatchedFile(settings.principals, read_principals),
        WatchedFile(settings.keys, _FirstKeys()),
        tokens,
        clock,
    )


class _FirstKeys:
    """Reads the file of keys, which may be missing until it is there for the first time.

    A file that has gone later is a fault and revokes nothing: a disk that is not mounted must not
    lock everybody out.
    """

    def __init__(self) -> None:
        self._was_there = False

    def __call__(self, path: Path) -> Mapping[str, IssuedKey]:
        try:
            found = read_keys(path)
        except FileNotFoundError as error:
            if self._was_there:
                raise refused.unreadable(path, error) from error
            return {}
        self._was_there = True
        return found


def _shown(names: frozenset[str]) -> str:
    text = ", ".join(sorted(names))
    return text if len(text) <= 256 else f"{text[:256]}…"
