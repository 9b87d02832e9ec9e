"""Who sends a call, and whether its method is for them: decided before the request is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

import grpc
from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.access.identity import refused
from loraplex_server.access.identity.credentials import Credentials
from loraplex_server.access.identity.refused import BadCredential
from loraplex_server.access.principals import EVERYBODY, Principal
from loraplex_server.access.roles import METHOD_ROLES, OPEN_METHODS, is_managing

RECHECK_SECONDS: Final = 30.0
"""Seconds after which the caller of a call that lasts is identified again."""

NOBODY: Final = Principal(name="", base=False)
"""The caller of a method for everybody, and of a call whose caller is not known. It may do nothing
else."""

_HEADER: Final = "authorization"
_CERTIFICATE_NAMES: Final = ("x509_common_name", "x509_subject_alternative_name")

_Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M")


class Identifies(Protocol):
    """Knows the owners of credentials."""

    def identify(self, credentials: Credentials) -> Principal:
        """The owner. Raises Refusal: CREDENTIALS_MISSING, CREDENTIALS_INVALID."""


class AccessCheck:
    """Decides about the calls that arrive at one address.

    What is not allowed explicitly is refused: a method without an entry in `METHOD_ROLES` or
    `OPEN_METHODS` is refused to every caller.
    """

    def __init__(self, directory: Identifies | None, *, manages: bool) -> None:
        """Without a directory every caller is `EVERYBODY`.

        `manages`: whether the address serves calls that manage adapters and training jobs.
        """
        self._directory = directory
        self._manages = manages

    def identify(self, method: str, context: _Context) -> Principal:
        """The caller. Raises Refusal: CREDENTIALS_MISSING, CREDENTIALS_INVALID."""
        if method in OPEN_METHODS:
            return NOBODY
        if self._directory is None:
            return EVERYBODY
        return self._directory.identify(credentials_of(context))

    def require(self, method: str, principal: Principal) -> None:
        """Raises Refusal(PERMISSION_DENIED) unless the principal may call the method here."""
        if method in OPEN_METHODS:
            return
        roles = METHOD_ROLES.get(method, frozenset())
        if principal.roles.isdisjoint(roles):
            name = method.rpartition("/")[2]
            needed = " or ".join(sorted(roles))
            text = f"{name} needs the role {needed}" if roles else f"nobody may call {name}"
            raise Refusal(Reason.PERMISSION_DENIED, text)
        if not self._manages and is_managing(method):
            text = "calls that manage adapters and training jobs are not served at this address"
            raise Refusal(Reason.PERMISSION_DENIED, text)

    def standing(self, method: str, context: _Context, principal: Principal) -> Standing | None:
        """Watches over the permission for a call that lasts; None if it cannot end."""
        if self._directory is None or method in OPEN_METHODS:
            return None

        def confirm() -> None:
            now = self.identify(method, context)
            self.require(method, now)
            if (now.name, now.adapters) != (principal.name, principal.adapters):
                text = "what the caller may see has changed; call again"
                raise Refusal(Reason.PERMISSION_DENIED, text)

        return Standing(confirm)


class Standing:
    """Confirms from time to time that the caller of a call may still make it."""

    def __init__(self, confirm: Callable[[], None]) -> None:
        """`confirm` raises Refusal if the caller no longer may."""
        self._confirm = confirm
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + RECHECK_SECONDS

    def check(self) -> None:
        """Confirms if that is due. Raises Refusal."""
        if self._loop.time() >= self._due:
            self._due = self._loop.time() + RECHECK_SECONDS
            self._confirm()

    async def over(self, events: AsyncGenerator[M, None]) -> AsyncGenerator[M, None]:
        """Yields the events, and closes them in the end.

        Raises Refusal soon after the permission has ended, also while there are no events.
        """
        coming: asyncio.Future[M | None] | None = None
        async with aclosing(events):
            try:
                while True:
                    coming = asyncio.ensure_future(anext(events, None))
                    while not coming.done():
                        left = max(0.0, self._due - self._loop.time())
                        await asyncio.wait({coming}, timeout=left)
                        self.check()
                    event = coming.result()
                    if event is None:
                        return
                    yield event
            finally:
                if coming is not None:
                    await _abandon(coming)


async def _abandon(work: asyncio.Future[Any]) -> None:
    """Cancels work that still runs, and waits for its end."""
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # has been seen


def credentials_of(context: _Context) -> Credentials:
    """The credentials of a call: one `authorization` at most, and names of a verified certificate.

    gRPC bounds their size. Raises Refusal(CREDENTIALS_INVALID).
    """
    metadata = context.invocation_metadata() or ()
    given = [value for key, value in metadata if key == _HEADER]
    if len(given) > 1:
        raise refused.invalid() from BadCredential(f"{len(given)} values of {_HEADER}")
    authorization = given[0] if given else ""
    if not isinstance(authorization, str):
        raise refused.invalid() from BadCredential(f"a value of {_HEADER} that is no text")
    return Credentials(authorization, _certificate_names(context))


def _certificate_names(context: _Context) -> frozenset[str]:
    """The names in the client's certificate; gRPC gives only those of one that it has verified."""
    known = context.auth_context() or {}
    names = set()
    for kind in _CERTIFICATE_NAMES:
        for name in known.get(kind, ()):
            try:
                names.add(name.decode())
            except UnicodeDecodeError:
                continue
    return frozenset(names)
