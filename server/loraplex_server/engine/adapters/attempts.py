"""Work on adapters that the process may not survive, announced before it begins.

The front process needs to know which adapters were read, put on the device or merged at the moment
when the engine process ended. Therefore each piece of work is announced before it begins, from the
thread that does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from loraplex_server.engine.messages import Attempt
from loraplex_server.engine.runner.protocol import DeviceLost

LOAD: Final = "load"
"""Work: reading an adapter, or putting it on the device."""

MERGE: Final = "merge"
"""Work: computing an adapter's dense copies, or putting them on the device."""


def _nowhere(attempt: Attempt) -> None:
    """Announces nothing."""


class Announcements:
    """Announces work on adapters. `send` is called on any thread and must send at once."""

    def __init__(self, send: Callable[[Attempt], None] = _nowhere) -> None:
        self._send = send

    @contextmanager
    def of(self, digest: str, work: str) -> Iterator[None]:
        """Announces `work` on an adapter for the duration of the context.

        Work in which the device is lost does not end, since the process does not survive it.
        """
        self._send(Attempt(digest, work, begun=True))
        try:
            yield
        except DeviceLost:
            raise
        except BaseException:
            self._send(Attempt(digest, work, begun=False))
            raise
        self._send(Attempt(digest, work, begun=False))
