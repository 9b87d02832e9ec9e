"""A file whose content is used as long as it is right, and read again when it changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from loraplex_model.base.refusal import Refusal

T = TypeVar("T")

_Print = tuple[int, int, int, int, int]


class WatchedFile(Generic[T]):
    """The last good content of a file. `value` may be read while another thread refreshes.

    Attributes:
        path: the file.
        value: what `read` made of the content. It is replaced as a whole and never changed.
        fault: what is wrong with the content that the file has now; "" if `value` is from it.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        """Reads the file. Lets through what `read` raises: Refusal if the content is wrong."""
        self.path = path
        self._read = read
        # Taken before the content is: a change in between shows as one at the next refresh.
        self._seen = _print(path)
        self.value = read(path)
        self.fault = ""

    def refresh(self) -> bool:
        """Reads the file again if it has changed, or was wrong; returns whether `value` is new."""
        seen = _print(self.path)
        if seen == self._seen and not self.fault:
            return False
        self._seen = seen
        try:
            self.value = self._read(self.path)
        except Refusal as refusal:
            self.fault = refusal.message
            return False
        self.fault = ""
        return True


def _print(path: Path) -> _Print | None:
    """What changes with every change of a file, its permissions included; None without a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
