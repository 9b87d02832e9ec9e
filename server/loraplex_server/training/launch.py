"""Replaces itself by a command that must neither outlive nor disturb the process that started it.

    python launch.py PARENT NICENESS COMMAND...

COMMAND keeps the pid and the pipes. Linux kills it when its parent dies, and kills it before other
processes when memory runs out.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
ORPHANED: Final = 3
"""Exit status if the parent has died already."""


def main(arguments: list[str]) -> None:
    parent, niceness, *command = arguments
    # A background job of a shell ignores SIGINT and its children inherit that. SIGINT must work
    # here: the server stops the trainer with it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with suppress(OSError):
        os.nice(int(niceness))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(ORPHANED)
    os.execvp(command[0], command)  # noqa: S606  (there is no shell)


if __name__ == "__main__":
    main(sys.argv[1:])
