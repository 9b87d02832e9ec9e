"""The directory of principals: finds out which principal sent a call's credentials."""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_server.access.credentials import Credentials
from loraplex_server.access.principals import Principal
from loraplex_server.series import Series
from loraplex_server.settings import Settings


class PrincipalDirectory:
    """The principals and their credentials, as the files say now.

    `identify` may be called from any thread while `refresh` runs in another.
    """

    @property
    def principals(self) -> Mapping[str, Principal]:
        """All principals by name."""
        raise NotImplementedError

    def identify(self, credentials: Credentials) -> Principal:
        """The principal that these credentials belong to; reads no file.

        Raises Refusal(CREDENTIALS_MISSING) if there are none, Refusal(CREDENTIALS_INVALID) if they
        are unknown, malformed, expired or revoked, with the same text for all of these.
        """
        raise NotImplementedError

    def refresh(self) -> bool:
        """Takes in files that have changed; returns whether the last state read is good.

        Blocks on the disk. Files that are wrong or unreadable change nothing: the error is logged
        once, and the state from before stays.
        """
        raise NotImplementedError

    async def watch(self, series: Series) -> None:
        """Refreshes once a second, in a thread, until it is cancelled."""
        raise NotImplementedError


def open_directory(settings: Settings) -> PrincipalDirectory | None:
    """Reads the files of principals and credentials; None if callers are not authenticated.

    Raises AccessFault, whose text names the file and every fault in it: exit code BAD_CONFIG.
    """
    raise NotImplementedError


class AccessFault(Exception):
    """A file of principals or credentials that cannot be used. The text is for the operator."""
