"""What a caller proves its identity with, as it arrives with a call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of one call. `repr` shows none of them.

    Attributes:
        authorization: value of the metadata `authorization`, such as "Bearer lpx_..."; "" if the
            call has none.
        certificate: names of the client's verified certificate: its common name and its
            alternative names, without their kind; empty without one.
    """

    authorization: str = ""
    certificate: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Credentials(certificate={sorted(self.certificate)})"
