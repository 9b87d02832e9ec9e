"""The options of the server's address, of encryption and of the key, on every command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from loraplex import channel
from loraplex.access.options import AccessOptions
from loraplex.cli.options import option

_FILE = {"metavar": "FILE", "dir_okay": False}

OPTIONS: Mapping[str, Any] = {
    "tls": Annotated[
        bool | None,
        option(
            "Server",
            "Encrypt, and accept servers that this system's authorities have certified.",
            "--tls/--no-tls",
            show_default="$LORAPLEX_TLS",
        ),
    ],
    "ca": Annotated[
        Path | None,
        option(
            "Server",
            "PEM file of the authorities to accept instead; implies --tls.",
            "--ca",
            show_default="$LORAPLEX_CA",
            **_FILE,
        ),
    ],
    "server_name": Annotated[
        str | None,
        option(
            "Server",
            "Name in the server's certificate, if the address has another; implies --tls.",
            "--server-name",
            metavar="NAME",
            show_default="$LORAPLEX_SERVER_NAME",
        ),
    ],
    "certificate": Annotated[
        Path | None,
        option(
            "Server",
            "PEM file of this client's certificate; implies --tls.",
            "--certificate",
            show_default="$LORAPLEX_CERTIFICATE",
            **_FILE,
        ),
    ],
    "private_key": Annotated[
        Path | None,
        option(
            "Server",
            "PEM file with the private key of --certificate.",
            "--private-key",
            show_default="$LORAPLEX_PRIVATE_KEY",
            **_FILE,
        ),
    ],
    "key_file": Annotated[
        Path | None,
        option(
            "Server",
            "File with the key that the calls carry. A key is no option itself, since other "
            "users of the machine can see command lines; LORAPLEX_KEY can hold it.",
            "--key-file",
            show_default="$LORAPLEX_KEY_FILE",
            **_FILE,
        ),
    ],
}
"""The options that become `AccessOptions`, by their keys. None of them has a secret as its value.

The client reads the variables that the help names.
"""


@dataclass(frozen=True, slots=True)
class GivenServer:
    """Where the server is, and how to reach it: what was given before a command, or after it."""

    target: str = ""
    access: AccessOptions = field(default_factory=AccessOptions)

    @property
    def shown(self) -> str:
        """The target, for messages."""
        return self.target or channel.DEFAULT_TARGET

    def updated(self, target: str | None, given: Mapping[str, Any]) -> GivenServer:
        """The address with what was given in addition; "" and None change nothing."""
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        access: Any = {**self.access, **known}
        return GivenServer(target or self.target, access)

    def without_key(self) -> GivenServer:
        """The same address for calls that carry no key, not even one of the environment."""
        access: Any = {**self.access, "key": "", "key_file": None}
        return GivenServer(self.target, access)


def take(given: dict[str, Any]) -> dict[str, Any]:
    """Removes the options of `OPTIONS` from the arguments of a command and returns them."""
    return {name: given.pop(name) for name in OPTIONS if name in given}
