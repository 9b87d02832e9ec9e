"""Exit codes of `loraplex-server`."""

from __future__ import annotations

from enum import IntEnum


class ServerExit(IntEnum):
    """Exit code of a command. Death by signal n is 128 + n, as in a shell."""

    OK = 0
    REFUSED = 1
    """A command was refused or found a fault."""
    BAD_CONFIG = 2
    PORT_IN_USE = 3
    NO_MODEL = 4
    STORE_UNUSABLE = 5
