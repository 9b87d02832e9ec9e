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
    ENGINE_LOST = 6
    """The engine cannot be kept running: the server gave up restarting it."""
    BASE_CHANGED = 7
    """A restarted engine reports another base model than the first one."""
    INTERNAL = 8
    """An unexpected error ended a part that must run as long as the server."""
