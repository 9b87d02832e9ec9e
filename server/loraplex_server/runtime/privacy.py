"""Keeps what the server holds and writes from other users of the machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loraplex_model.base.process.core_dumps import forbid_core_dumps

from loraplex_server.settings import ServerSettings

_OWNER_ONLY: Final = 0o077
_OWNER_AND_GROUP: Final = 0o007
"""Permissions that new files and directories do not get."""


def keep_private(settings: ServerSettings) -> None:
    """Applies to this process, and to those that it starts, what the settings leave private.

    To be called once, at start. New files and directories are the owner's alone. Only if the group
    may write to the store's directory, as where servers of several users share it, they are the
    group's too. Core dumps are forbidden unless core_dumps allows them.
    """
    if not settings.core_dumps:
        forbid_core_dumps()
    mode = _mode(settings.store)
    os.umask(_OWNER_AND_GROUP if mode is not None and mode & stat.S_IWGRP else _OWNER_ONLY)


def exposures(settings: ServerSettings) -> Iterator[str]:
    """Yields a sentence for each directory that is open to other users of the machine."""
    readable = [settings.store]
    if settings.training:
        readable.append(settings.training_jobs_dir)
    for path in readable:
        mode = _mode(path)
        if mode is not None and mode & (stat.S_IROTH | stat.S_IXOTH | stat.S_IWOTH):
            yield f"{path}: other users of this machine have access (mode {mode:04o}); chmod o= it"
    mode = _mode(settings.cache)
    if mode is not None and mode & stat.S_IWOTH:
        yield (
            f"{settings.cache}: other users of this machine can change what the server runs "
            f"(mode {mode:04o}); chmod o-w it"
        )


def _mode(path: Path) -> int | None:
    """The permissions of a directory; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return stat.S_IMODE(found.st_mode) if stat.S_ISDIR(found.st_mode) else None
