"""A file that stays mapped: whether it is still the file that was verified.

Reading a mapped page that was cut off ends the process with SIGBUS; in the last page it reads
zeros. So the file is checked before its pages are read again. Copies of what has been read (the
kernels' panels, tensors on another device) are not affected.
"""

from __future__ import annotations

import os
from pathlib import Path


class MappedFile:
    """The size and the time of last change of a file, and a descriptor that keeps it.

    A file that is replaced by a rename or removed stays readable under its descriptor, so neither
    is a change.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._state = self._look()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def is_intact(self) -> bool:
        """Whether nothing was written to the file or cut from it. Makes one system call."""
        return self._look() == self._state

    def _look(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns
